"""What an operator does with what is stored, with the real commands against a real server."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx

from perdure.core.clock import SystemClock
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import perdure, serving


async def respond(client: httpx.AsyncClient, text: str, **more: str | bool) -> str:
    body = {"model": "perdure-extract", "input": text, **more}
    answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


# proves R13
async def test_operators_find_show_and_remove_what_is_stored(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:
        made = [await respond(client, f"text {number}") for number in range(3)]
        metadata = {"metadata": {"name": "[bold]a[/]"}}
        conversation = (await client.post("/v1/conversations", json=metadata)).json()["id"]
        page = (await client.get("/v1/responses", params={"limit": 2})).json()
        assert (page["object"], page["has_more"], page["damaged"]) == ("list", True, [])
        for one in page["data"]:
            assert (await client.get(f"/v1/responses/{one['id']}")).json() == one
        rest = await client.get("/v1/responses", params={"after": page["last_id"]})
        ids = [one["id"] for one in page["data"] + rest.json()["data"]]
        assert sorted(ids) == sorted(made)
        failed = (await client.get("/v1/responses?status=failed")).json()
        assert (failed["data"], failed["first_id"], failed["has_more"]) == ([], None, False)
        for wrong in (
            "status=done",
            "status=null",
            "limit=0",
            "limit=101",
            "after=resp_x",
            "order=up",
            "x=1",
        ):
            for path in ("/v1/responses", "/v1/conversations"):
                assert (await client.get(f"{path}?{wrong}")).status_code == 400, (path, wrong)

        listed = await perdure("responses", "ls", *data, "--json")
        assert [one["id"] for one in listed.json()["data"]] == ids
        shown = await perdure("responses", "ls", *data, "--status", "completed", COLUMNS="40")
        assert all(f"{one}  completed  20" in shown.out for one in made)
        one = await perdure("responses", "show", made[0], *data)
        assert one.json() == (await client.get(f"/v1/responses/{made[0]}")).json()
        refused = await perdure("responses", "cancel", made[0], *data)
        assert (refused.code, "Cannot cancel" in refused.err) == (2, True)
        removed = await perdure("responses", "rm", made[0], *data)
        assert (removed.code, removed.out) == (0, f"{made[0]}: deleted\n")
        assert (await perdure("responses", "show", made[0], *data)).code == 3
        assert "name=[bold]a[/]" in (await perdure("conversations", "ls", *data)).out
        assert (await perdure("conversations", "rm", conversation, *data)).code == 0
        assert (await perdure("conversations", "show", conversation, *data)).code == 3
        assert await server.end() == 0
    stopped = await perdure("responses", "ls", *data)
    assert (stopped.code, "perdure serve" in stopped.err) == (5, True)


# proves R13
async def test_operators_find_files_and_jobs(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:
        sent = {"files": {"file": ("[a].txt", b"four")}, "data": {"purpose": "user_data"}}
        file = (await client.post("/v1/files", **sent)).json()["id"]
        made = await respond(client, "text", background=True)

        async def ended() -> bool:
            return (await client.get(f"/v1/responses/{made}")).json()["status"] == "completed"

        await wait_until(ended, 20, "the end of a response in the background")
        listed = (await perdure("files", "ls", *data)).out
        assert f"{file}  20" in listed
        assert "4 bytes  user_data  processed  [a].txt" in listed
        assert (await perdure("files", "ls", *data, "--purpose", "batch", "--json")).json()[
            "data"
        ] == []
        assert (await perdure("files", "show", file, *data)).json()["bytes"] == 4
        removed = await perdure("files", "rm", file, *data)
        assert (removed.code, removed.out) == (0, f"{file}: deleted\n")
        assert (await perdure("files", "show", file, *data)).code == 3

        found = await perdure("jobs", "ls", *data, "--status", "succeeded", "--json")
        (job,) = found.json()["data"]
        assert job["subject"] == made
        told = (await perdure("jobs", "ls", *data, "--kind", "background_response")).out
        assert f"{job['id']}  succeeded  20" in told
        assert (await perdure("jobs", "show", job["id"], *data)).json()["attempts"]
        again = await perdure("jobs", "cancel", job["id"], *data)
        assert (again.code, again.out) == (0, f"{job['id']}: succeeded\n")
        assert (await perdure("jobs", "show", "job_x", *data)).code == 3


# proves R13
async def test_status_and_metrics_say_what_each_surface_takes(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:

        async def measured() -> bool:
            return (await client.get("/v1/usage")).json()["last"] is not None

        await wait_until(measured, 20, "a measurement")
        status = await perdure("status", *data)
        assert status.code == 0
        assert "responses " in status.out.split("disk: ")[1]
        assert "jobs: 0 running, 0 queued, 0 waiting to be tried again" in status.out
        found = (await perdure("status", *data, "--json")).json()["usage"]
        assert found["total_bytes"] >= sum(one["size_bytes"] for one in found["surfaces"]) > 0
        assert (
            'perdure_surface_size_bytes{surface="responses"}' in (await client.get("/metrics")).text
        )


# proves R13
async def test_prune_says_what_would_go_and_then_removes_it(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:
        first = await respond(client, "one")
        second = await respond(client, "two", previous_response_id=first)
        unset = await perdure("prune", "--dry-run", *data)
        assert (unset.code, "retention.responses_days" in unset.err) == (2, True)
        young = await perdure("prune", "--days", "1", *data, "--json")
        assert young.json()["responses"] == 0

        made_s = SystemClock().now_s()

        async def old() -> bool:
            return SystemClock().now_s() > made_s + 10

        await wait_until(old, 30, "ten seconds later")
        told = await perdure("prune", "--dry-run", "--days", "0.0001", *data)
        assert sorted(told.out.split("\n")[:2]) == sorted((first, second))
        assert "2 responses from before" in told.out
        assert (await client.get(f"/v1/responses/{first}")).status_code == 200
        assert await server.end() == 0
    done = await perdure("prune", "--days", "0.0001", *data, "--json")
    assert done.json()["responses"] == 2
    assert (await perdure("verify", *data)).code == 0
    async with serving(tmp_path / "data") as server, server.client() as client:
        assert (await client.get("/v1/responses")).json()["data"] == []


# proves C11
async def test_a_second_server_names_the_first_whether_that_works_or_is_paused(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path / "data") as first, first.client() as asking:
        for number in (signal.SIGCONT, signal.SIGSTOP):
            first.process.send_signal(number)
            second = await perdure("serve", "--data", str(tmp_path / "data"), "--port", "0")
            assert second.code == 5
            assert f"is in use by process {first.pid}. Stop that process first" in second.err
        first.process.send_signal(signal.SIGCONT)
        assert (await asking.post("/v1/conversations", json={})).status_code == 200


# proves S7
async def test_a_server_over_shards_spreads_over_one_that_was_added(tmp_path: Path) -> None:
    data, given = tmp_path / "data", tmp_path / "perdure.toml"

    def list_shards(*numbers: int) -> None:
        places = (tmp_path / f"{number}" / "state.db" for number in numbers)
        urls = ", ".join(f'"sqlite:///{place}"' for place in places)
        given.write_text(f"shards = [{urls}]")

    options = ("--config", str(given))
    list_shards(0, 1)
    async with serving(data, *options) as server, server.client() as client:
        made = await respond(client, "text")
        shards = [one["id"] for one in (await client.get("/v1/state")).json()["shards"]["shards"]]
        assert await server.end() == 0
    list_shards(2, 1, 0)
    async with serving(data, *options) as server, server.client() as client:
        assert (await client.get(f"/v1/responses/{made}")).json()["status"] == "completed"
        done = await perdure("reshard", "--data", str(data), *options, "--json")
        assert len(done.json()["shards"]) == 3, done.err
        wrong = await perdure("reshard", "--drain", "nowhere", "--data", str(data), *options)
        assert (wrong.code, "there is no shard nowhere" in wrong.err) == (2, True)
        await respond(client, "text")
        assert await server.end() == 0
    (tmp_path / "2").rename(tmp_path / "away")
    (tmp_path / "2").touch()
    async with serving(data, *options) as server, server.client() as client:
        (added,) = [id for id in done.json()["shards"] if id not in shards]
        assert (await client.get(f"/v1/responses/{made}")).json()["status"] == "completed"
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True)
        (warning,) = ready.json()["warnings"]
        assert f"shard {added} at sqlite:///{tmp_path / '2'}/state.db is down" in warning
        assert "perdure_shards_down 1.0" in (await client.get("/metrics")).text
        for path in ("/v1/startup", "/v1/state"):
            report = (await client.get(path)).json()
            assert (report["warnings"], report["shards"]["missing"]) == ([warning], [added])
        told = await perdure("status", "--data", str(data), *options)
        assert (told.code, added in told.out.replace("\n", "")) == (0, True)
        (tmp_path / "2").unlink()
        (tmp_path / "away").rename(tmp_path / "2")

        async def joined() -> bool:
            report = (await client.get("/v1/startup")).json()
            found = [one["surface"] for one in report["recovery"]]
            return not report["warnings"] and f"shard {added}" in found

        await wait_until(joined, 30, "the shard to be joined")
        assert await server.end() == 0
