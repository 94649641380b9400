"""Jobs over HTTP: found, shown with their history, counted, and cancelled."""

from __future__ import annotations

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.frontends.conftest import Serve
from tests.frontends.test_http_background import WITHIN_S, create, ended


# proves R13
async def test_a_job_is_shown_with_its_owner_and_its_history(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url)
    done = await ended(server, (await create(server, "echo hi"))["id"])
    running = await create(server, "hang 3")
    await upstream.received(2)
    page = await server.json("GET", "/v1/jobs")
    by_subject = {job["subject"]: job for job in page["data"]}  # both may be of one second
    assert len(page["data"]) == len(by_subject) == 2
    first, second = by_subject[running["id"]], by_subject[done["id"]]
    newer, older = (job["subject"] for job in page["data"])
    boot = server.node.boot_id
    assert (first["status"], first["owed"]) == ("running", "run")
    assert first["lease"] == {"owner": boot, "epoch": 1}
    assert (second["status"], second["owed"], second["lease"]) == ("succeeded", None, None)
    shown = await server.json("GET", f"/v1/jobs/{second['id']}")
    assert {name: shown[name] for name in second} == second
    (attempt,) = shown["attempts"]
    assert attempt["attempt"] == 1
    assert attempt["ended_at"] >= attempt["began_at"] >= shown["created_at"]
    (step,) = shown["steps"]
    assert (step["name"], step["subject"]) == ("message", done["output"][0]["id"])
    assert (step["attempt"], step["abandoned"]) == (1, False)
    assert [(event["type"], event["owner"]) for event in shown["events"]] == [
        ("began", boot),
        ("step", boot),
        ("ended", boot),
    ]
    for asked, subjects in (
        ("status=running", [running["id"]]),
        ("status=succeeded&kind=background_response", [done["id"]]),
        ("kind=ingestion", []),
        ("limit=1", [newer]),
        (f"after={page['data'][0]['id']}", [older]),
    ):
        found = await server.json("GET", f"/v1/jobs?{asked}")
        assert [job["subject"] for job in found["data"]] == subjects
    for wrong in ("status=done", "status=null", "limit=0", "after=job_x", "x=1"):
        assert (await server.client.get(f"/v1/jobs?{wrong}")).status_code == 400, wrong
    assert (await server.client.get("/v1/jobs/job_x")).status_code == 404


# proves R13, R5
async def test_a_cancelled_job_ends_what_it_makes(serve: Serve, upstream: ScriptedUpstream) -> None:
    server = await serve(upstream__url=upstream.url)
    made = await create(server, "hang 3")
    (job,) = (await server.json("GET", "/v1/jobs"))["data"]
    cancelled = await server.json("POST", f"/v1/jobs/{job['id']}/cancel")
    assert (cancelled["status"], cancelled["owed"]) == ("cancelled", None)
    assert (await server.json("GET", f"/v1/responses/{made['id']}"))["status"] == "cancelled"
    assert await server.json("POST", f"/v1/jobs/{job['id']}/cancel") == cancelled
    assert (await server.client.post("/v1/jobs/job_x/cancel")).status_code == 404


# proves R13, O3
async def test_jobs_are_counted_by_how_far_they_are(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, jobs__running_max=1)
    first, second, third = [(await create(server, "hang 3"))["id"] for _ in range(3)]
    jobs = server.node.jobs

    async def counted(running: int, queued: int) -> bool:
        counts = jobs.counts()
        return (counts.running, counts.queued, counts.waiting) == (running, queued, 0)

    await wait_until(lambda: counted(1, 2), WITHIN_S, "two that wait for the first")
    metrics = (await server.client.get("/metrics")).text
    assert 'perdure_jobs{status="running"} 1.0' in metrics
    assert 'perdure_jobs{status="queued"} 2.0' in metrics
    assert jobs.counts().oldest_queued_age_s > 0
    assert (await server.json("GET", "/v1/usage"))["jobs"]["queued"] == 2
    await server.json("POST", f"/v1/responses/{second}/cancel")
    await wait_until(lambda: counted(1, 1), WITHIN_S, "one that waits for the first")
    for one in (first, third):
        await server.json("POST", f"/v1/responses/{one}/cancel")
    await wait_until(lambda: counted(0, 0), WITHIN_S, "no jobs at all")
    assert jobs.counts().oldest_queued_age_s == 0
