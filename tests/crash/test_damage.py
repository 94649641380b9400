"""Damage: one changed byte in a stored row is an error, never another answer; and a server that
does not look at checksums is caught giving one."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import httpx
import pytest

from perdure.core import keys
from perdure.engines.sqlite_driver import connect
from perdure.proving.campaign import Campaign, Stage
from perdure.proving.client import Answer, Client
from perdure.proving.launcher import Plan
from perdure.proving.snapshot import STORE
from perdure.surfaces.responses import RESPONSES

pytestmark = pytest.mark.asyncio(loop_scope="module")


def change_a_byte(path: Path, response_id: str) -> None:
    """Through SQLite, so that page checksums fit and only the row's own does not."""
    place = keys.join(("default", response_id))
    connection: apsw.Connection = connect(str(path))
    try:
        table = f"records_{RESPONSES.name}"
        body = connection.execute(f"SELECT attachment FROM {table} WHERE key = ?", (place,)).get
        assert body.count(b"precious") == 1
        changed = body.replace(b"precious", b"specious")
        connection.execute(f"UPDATE {table} SET attachment = ? WHERE key = ?", (changed, place))
    finally:
        connection.close()


async def damaged(stage: Stage, home: Path, plant: str | None) -> tuple[bytes, Answer, Answer]:
    """A response as it was answered; then, its row damaged, what GET says of it and of another."""
    plan = Plan(data=str(home / "data"), port=stage.port, upstream=stage.upstream.url, plant=plant)
    with Campaign(stage, home) as campaign:
        victim = await stage.nursery.start(plan)
        await victim.ready()
        client = Client(victim.url, campaign.history, 0, random.Random(0))
        sent = [{"model": "scripted", "input": f"count {n}"} for n in (2, 3)]
        sent[0]["metadata"] = {"kind": "precious"}
        first, other = [await client.send("POST", "/v1/responses", body) for body in sent]
        victim.signal()
        await victim.death()
        change_a_byte(home / "data" / STORE, first.json()["id"])
        victim = await stage.nursery.start(plan)
        await victim.ready()
        answers = [await client.get(f"/v1/responses/{it.json()['id']}") for it in (first, other)]
        await client.close()
        assert answers[1].body == other.body
        transport = httpx.AsyncHTTPTransport(uds=str(home / "data" / "control.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://control") as control:
            found = (await control.get("/control/verify")).json()
        victim.signal()
        await victim.death()
        assert found["ok"] is (plant is not None)
    return first.body, answers[0], answers[1]


# proves C7
async def test_a_damaged_row_is_never_answered(stage: Stage, tmp_path: Path) -> None:
    body, answer, _ = await damaged(stage, tmp_path, None)
    assert answer.status == 500
    assert answer.code == "damaged"
    assert b"specious" not in answer.body
    assert body != answer.body


async def test_a_server_that_trusts_rows_is_caught(stage: Stage, tmp_path: Path) -> None:
    body, answer, _ = await damaged(stage, tmp_path, "trusts-rows")
    assert answer.status == 200
    assert answer.body != body
