"""Compacting: what is asked of the upstream, what comes back, and what is not believed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from perdure.core.batch import Batch
from perdure.core.clock import SystemClock
from perdure.core.errors import Unavailable
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.compaction import ASSIGNMENT
from perdure.services.sealing import HEAD, Sealing
from perdure.services.upstream import UpstreamFailed
from perdure.wire.errors import WireError
from tests.services.conftest import Driver, Open, someone


async def compacted(driver: Driver, summary: str, **fields: Any) -> dict[str, Any]:
    """The one item of a compaction whose summary is `summary`."""
    body = {"model": "echo-" + summary.replace(" ", "-")} | fields
    made = await driver.node.compactor.compact("default", body)
    [item] = made.answer.output
    return item


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# proves R1
async def test_the_upstream_is_asked_to_summarise_all_of_it(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    first = await driver.answer("echo one")
    item = await compacted(
        driver, "so far", previous_response_id=first["id"], input=[user("and two")]
    )
    asked = (await upstream.received())[-1]
    said = [message["content"] for message in asked["messages"]]
    assert said == ["echo one", "one", "and two", ASSIGNMENT]
    again = await compacted(driver, "and on", input=[item, user("three")])
    asked = (await upstream.received())[-1]
    assert asked["messages"][0]["content"] == HEAD + "so far"
    assert again["id"] != item["id"]


# proves R1
async def test_a_compaction_opens_a_conversation(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    item = await compacted(driver, "so far", input="hello")
    conversation = await driver.conversation()
    await driver.node.conversations.add_items(someone(), conversation, {"items": [item]})
    await driver.answer("echo on", conversation=conversation)
    asked = (await upstream.received())[-1]
    assert [message["content"] for message in asked["messages"]] == [HEAD + "so far", "echo on"]


def changes(content: str) -> list[str]:
    """Everything near a sealed content that is not it."""
    format, text, mac = content.split(".")
    return [
        "",
        content + "A",
        content[:-1],
        content + ".",
        f"{format}.{text}.",
        f"{format}..{mac}",
        f"perdure2.{text}.{mac}",
        f"{format}.{text}=.{mac}",
        f"{format}.{text}\n.{mac}",
        f"{format}.QQ==.{mac}",
        f"{format}.\u00e9.{mac}",
        "gAAAAAB-from-somewhere-else",
        *(
            content[:at] + ("A" if content[at] != "A" else "B") + content[at + 1 :]
            for at in (9, 30)
        ),
    ]


# proves R1
async def test_what_this_server_did_not_write_is_refused_everywhere(driver: Driver) -> None:
    item = await compacted(driver, "so far", input="hello")
    conversation = await driver.conversation()
    for content in changes(item["encrypted_content"]):
        changed = item | {"encrypted_content": content}
        sent = {"model": "scripted", "input": [user("x"), changed]}
        for refusing in (
            driver.node.gateway.create(someone(), sent),
            driver.node.compactor.compact("default", sent),
            driver.node.tokens.count("default", sent),
            driver.node.conversations.add_items(
                someone(), conversation, {"items": [user("x"), changed]}
            ),
        ):
            with pytest.raises(WireError) as refused:
                await refusing
            assert refused.value.code == "invalid_encrypted_content", content
            assert (refused.value.param or "").endswith("[1].encrypted_content")
    assert await driver.words(conversation) == []


# proves R1
async def test_a_seal_is_its_tenants_own(driver: Driver) -> None:
    sealing = Sealing(driver.node.state, SystemClock())
    item = await compacted(driver, "so far", input="hello")
    [read] = await sealing.opened("default", [item])
    assert read["content"][0]["text"] == HEAD + "so far"
    for _ in range(2):
        with pytest.raises(WireError, match="could not be verified"):
            await sealing.opened("other", [item])
        await sealing.sealed("other", "now it has a secret too")


# proves R1
async def test_the_first_seals_of_all_race_for_one_secret(opened: Open) -> None:
    class Slow(Wrapping):
        let = asyncio.Event()

        async def commit(self, batch: Batch) -> Committed:
            await self.let.wait()
            return await super().commit(batch)

    Slow.let.set()
    driver = await opened(wrap=Slow)
    Slow.let.clear()
    sealing = Sealing(driver.node.state, SystemClock())
    racing = [asyncio.ensure_future(sealing.sealed("default", f"n{n}")) for n in range(4)]
    await asyncio.sleep(0)
    Slow.let.set()
    for content in await asyncio.gather(*racing):
        await sealing.opened(
            "default", [{"id": "cmp_1", "type": "compaction"} | {"encrypted_content": content}]
        )


# proves R1
@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("length-5", "cut short"),
        ("cut-5", "closed"),
        ("fail-500", "500"),
        ("fail-after-3", "failure"),
    ],
)
async def test_half_a_summary_is_none(driver: Driver, model: str, why: str) -> None:
    with pytest.raises(UpstreamFailed, match=why):
        await driver.node.compactor.compact("default", {"model": model, "input": "hello"})


# proves R1
@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"input": "x"}, "model"),
        ({"model": None, "input": "x"}, "model"),
        ({"model": "m"}, "input"),
        ({"model": "m", "input": "x", "tools": []}, "tools"),
        ({"model": "m", "input": "x", "conversation": "conv_1"}, "conversation"),
        ({"model": "m", "input": "x", "image": {}}, "image"),
        ({"model": "m", "input": "x", "prompt_cache_options": {}}, "prompt_cache_options"),
        ({"model": "m", "previous_response_id": "resp_nobody"}, "previous_response_id"),
    ],
)
async def test_what_cannot_be_compacted_is_refused_by_name(
    driver: Driver, sent: dict[str, Any], param: str
) -> None:
    with pytest.raises(WireError) as refused:
        await driver.node.compactor.compact("default", sent)
    assert refused.value.param == param


async def test_a_client_that_leaves_stops_the_upstream(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    asking = asyncio.create_task(
        driver.node.compactor.compact("default", {"model": "hang-3", "input": "x"})
    )
    await upstream.received(1)
    asking.cancel()
    assert await upstream.left_early(1) == 1


async def test_a_server_that_stops_compacts_nothing_more(driver: Driver) -> None:
    await driver.node.drain(0)
    with pytest.raises(Unavailable, match="stopping"):
        await compacted(driver, "late", input="x")
