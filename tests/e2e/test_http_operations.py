"""Starting, stopping and asking: what an operator does, with the real commands."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import STOPS_WITHIN_S, perdure, serving


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


# proves O2
async def test_sigterm_ends_clean_with_exit_code_0(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data) as server:
        assert "first start here" in server.said
        assert str(data) in server.said
        assert "curl http://" in server.said
        async with server.client() as client:
            assert (await client.get("/readyz")).status_code == 200
            assert await server.end() == 0
    assert not (data / "control.sock").exists()
    async with serving(data) as server:
        assert "the last one ended clean" in server.said
        assert await server.end(signal.SIGINT) == 0


# proves O2
async def test_sigterm_lets_requests_end_within_the_bound(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data = tmp_path / "data"
    async with serving(data, "--upstream", upstream.url) as server, server.sdk() as sdk:
        asking = asyncio.create_task(sdk.responses.create(model="m", input="slow 0.05 20"))
        await upstream.received(1)
        assert await server.end() == 0
        answer = await asking
        assert answer.status == "completed"
    async with serving(data, "--upstream", upstream.url) as server, server.sdk() as sdk:
        assert (await sdk.responses.retrieve(answer.id)).output_text == answer.output_text


# proves O2
async def test_what_outlasts_the_bound_ends_with_a_reason_and_its_stream_too(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data = tmp_path / "data"
    options = ("--upstream", upstream.url)
    async with (
        serving(data, *options, PERDURE_LIMITS_DRAIN_S="0.3") as server,
        server.sdk() as sdk,
    ):
        stream = await sdk.responses.create(model="m", input="hang 3", stream=True)
        events: list[Any] = []
        events.append(await anext(stream))
        server.process.terminate()
        events += [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert await asyncio.wait_for(server.process.wait(), STOPS_WITHIN_S) == 0
    async with serving(data, *options) as server, server.sdk() as sdk:
        assert "the last one ended clean" in server.said
        stored = await sdk.responses.retrieve(events[0].response.id)
        assert stored.status == "failed"
        assert stored.model_extra is not None
        assert stored.model_extra["perdure"]["reason"] == "server_stopped"


# proves O2
async def test_a_second_sigterm_cuts_the_wait_short(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data = tmp_path / "data"
    async with (
        serving(data, "--upstream", upstream.url, PERDURE_LIMITS_DRAIN_S="600") as server,
        server.client() as client,
    ):
        body = {"model": "m", "input": "hang 1"}
        asking = asyncio.create_task(client.post("/v1/responses", json=body))
        await upstream.received(1)
        server.process.terminate()

        async def refused() -> bool:
            with socket.socket() as probe:
                port = int(server.url.rsplit(":", 1)[1])
                return probe.connect_ex(("127.0.0.1", port)) != 0

        await wait_until(refused, STOPS_WITHIN_S, "the end of accepting")
        assert server.process.returncode is None
        assert await server.end() == 0
        await asyncio.wait((asking,))
    async with serving(data) as server:
        assert "the last one ended clean" in server.said


# proves C11
async def test_a_second_server_names_the_first_and_leaves_it_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data) as server:
        port = server.url.rsplit(":", 1)[1]
        for same in ("0", port):
            second = await perdure("serve", "--data", str(data), "--port", same)
            assert second.code == 5
            assert f"process {server.pid}" in second.err
            assert second.err.count("\n") == 1
            assert second.out == ""
        other = await perdure("serve", "--data", str(tmp_path / "other"), "--port", port)
        assert other.code == 5
        assert f":{port}" in other.err
        assert "--port" in other.err
        async with server.client() as client:
            assert (await client.get("/readyz")).status_code == 200
        await server.end(signal.SIGKILL)
    async with serving(data) as server:
        assert "did not end clean" in server.said


# proves C2
@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--engine", "sqlit:///x"], {}, "sqlit:///x"),
        (["--engine", "postgres:/localhost/x"], {}, "postgresql://HOST/DATABASE"),
        (["--config", "absent.toml"], {}, "absent.toml cannot be read"),
        (["--host", "0.0.0.0"], {}, "an API key is required"),
        (["--upstream", "nowhere:1"], {}, "http://"),
        (["--upstream-key-env", "NO_SUCH", "--upstream", "http://x"], {}, "NO_SUCH is absent"),
        ([], {"PERDURE_PROFILE": "shared"}, "responses (shared_durable_workflow_state)"),
        ([], {"PERDURE_LIMITS_BRUST": "1"}, "did you mean PERDURE_LIMITS_BURST?"),
        (["--engine", "memory://"], {"PERDURE_PROFILE": "shared"}, "--engine"),
    ],
)
async def test_a_wrong_setting_refuses_to_start_with_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], told: str
) -> None:
    data = tmp_path / "data"
    ended = await perdure(
        "serve", "--data", str(data), "--port", "0", *arguments, cwd=tmp_path, **environment
    )
    assert ended.code == 2, ended.err
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


# proves C2
@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "file"],
        ["--host", "203.0.113.5"],
        ["--engine", "postgresql://127.0.0.1:1/x"],
    ],
)
async def test_what_this_machine_does_not_have_is_one_line_too(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    options = ("serve", "--data", "data", "--port", "0", *arguments)
    ended = await perdure(*options, cwd=tmp_path, PERDURE_API_KEY="secret")
    assert ended.code == 5, ended.err
    assert ended.err.startswith("perdure: ")
    assert arguments[1] in ended.err
    assert "Traceback" not in ended.err


# proves C2
async def test_a_weaker_engine_starts_locally_with_a_warning(tmp_path: Path) -> None:
    async with serving(tmp_path / "data", "--engine", "memory://") as server:
        assert "warning" in server.said
        async with server.client() as client:
            ready = (await client.get("/readyz")).json()
        assert ready["ready"]
        assert "memory://" in ready["warnings"][0]


# proves C13, C15
async def test_status_tells_the_running_from_the_killed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    missing = await perdure("status", "--data", str(data), "--json")
    assert (missing.code, missing.json()["error"]["code"]) == (3, "missing")
    async with serving(data) as server:
        running = await perdure("status", "--data", str(data), "--json")
        assert running.code == 0
        told = running.json()
        assert (told["running"], told["ready"], told["pid"]) == (True, True, server.pid)
        assert told["startup"]["number"] == 1
        assert told["instances"][0]["ready"]
        assert "ready" in (await perdure("status", "--data", str(data))).out
        await server.end(signal.SIGKILL)
    dead = await perdure("status", "--data", str(data), "--json")
    assert dead.code == 3
    told = dead.json()
    assert (told["running"], told["ready"]) == (False, False)
    assert told["last_boot"]["ended_clean"] is False
    assert told["instances"][0]["ready"] is False, "however fresh its last sign of life is"
    assert told["instances"][0]["heartbeat_age_s"] >= 0
    assert "was killed" in (await perdure("status", "--data", str(data))).out
    async with serving(data) as server, server.client() as client:
        startup = (await client.get("/v1/startup")).json()
        assert (startup["number"], startup["previous_ended_clean"]) == (2, False)
        boots = (await client.get("/v1/boots")).json()["data"]
        assert [boot["boot"]["number"] for boot in boots] == [2, 1]
        await server.end()
    ended = (await perdure("status", "--data", str(data), "--json")).json()
    assert ended["last_boot"]["ended_clean"] is True
    assert ended["instances"][0]["ready"] is False


# proves C1
async def test_the_contract_is_the_same_however_it_is_asked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data) as server:
        async with server.client() as client:
            served = (await client.get("/v1/state")).json()
        online = (await perdure("contract", "--data", str(data), "--json")).json()
        await server.end()
    offline = await perdure("contract", "--data", str(data), "--json")
    assert offline.code == 0
    assert served == online == offline.json()
    told = (await perdure("contract", "--data", str(data))).out
    for surface in served["surfaces"]:
        assert surface["surface"] in told
        assert surface["durability"] in told


# proves C7
async def test_verify_lists_damage_with_and_without_a_server(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data) as server, server.sdk() as sdk:
        marked = "a sentence that will be damaged"
        await sdk.conversations.create(
            items=[{"type": "message", "role": "user", "content": marked}]
        )
        sound = await perdure("verify", "--data", str(data), "--json")
        assert (sound.code, sound.json()["ok"]) == (0, True)
        await server.end()
    assert (await perdure("verify", "--data", str(data))).out == "nothing is damaged\n"
    store = data / "perdure.db"
    content = store.read_bytes()
    assert content.count(marked.encode()) == 1
    store.write_bytes(content.replace(marked.encode(), marked.replace("will", "wi1l").encode()))
    offline = await perdure("verify", "--data", str(data), "--json")
    assert offline.code == 6, offline
    found = offline.json().get("findings")
    if found is not None:
        assert found
        assert all(finding["where"] for finding in found)


async def test_the_control_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data, PERDURE_API_KEY="secret") as server:
        path = data / "control.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await perdure("status", "--data", str(data))).code == 0
        async with server.client() as client:
            assert (await client.get("/v1/startup")).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            async with server.sdk() as sdk:
                await sdk.models.list()
        async with server.sdk(api_key="secret") as sdk:
            assert (await sdk.models.list()).data
        assert await server.end() == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        assert "secret" not in server.log.read_text()
        assert {line.get("caller") for line in lines} >= {"operator"}


async def test_a_path_too_long_for_a_socket_still_has_one(tmp_path: Path) -> None:
    data = tmp_path / ("deep" * 30) / "data"
    data.parent.mkdir()
    async with serving(data) as server:
        assert (await perdure("status", "--data", str(data))).code == 0
        note = (data / "perdure.db.lock").read_text().splitlines()
        elsewhere = Path(note[2])
        assert elsewhere.is_socket()
        assert stat.S_IMODE(elsewhere.parent.stat().st_mode) == 0o700
        assert await server.end() == 0
        assert not elsewhere.parent.exists()


# proves O6
async def test_there_is_a_file_for_every_connection(tmp_path: Path) -> None:
    few = ("prlimit", "--nofile=64:4096", "--")
    async with serving(tmp_path / "a", around=few, PERDURE_LIMITS_CONNECTIONS_MAX="1000") as server:
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0] >= 1000
        assert "limits.connections_max" not in server.log.read_text()
    async with serving(tmp_path / "b", around=few, PERDURE_LIMITS_CONNECTIONS_MAX="9000") as server:
        assert "connections beyond 3840 are refused" in server.log.read_text()


async def test_idle_memory_is_small(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server:
        statm = Path(f"/proc/{server.pid}/statm").read_text().split()
        assert int(statm[1]) * os.sysconf("SC_PAGE_SIZE") < 120_000_000


async def test_usage_and_version(tmp_path: Path) -> None:
    assert (await perdure("--version")).out.startswith("perdure 0.")
    helped = await perdure("--help")
    for command in ("serve", "status", "contract", "verify"):
        assert command in helped.out
    assert (await perdure("serve", "--prot", "1")).code == 2
