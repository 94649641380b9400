"""Several upstreams: which of them a model's name leads to, and what one that is silent hides."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.lifecycle import Node
from perdure.services.upstream import UpstreamFailed
from perdure.wire.errors import WireError
from tests.services.conftest import Over, at


def unused_url() -> str:
    """An address nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


@pytest.fixture
async def left() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(models=("small", "both")) as server:
        yield server


@pytest.fixture
async def right() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(models=("large", "both", "org/deep")) as server:
        yield server


# proves R12
@pytest.mark.parametrize(
    ("model", "name", "asked"),
    [
        ("small", "left", "small"),
        ("large", "right", "large"),
        ("both", "left", "both"),
        ("right/both", "right", "both"),
        ("org/deep", "right", "org/deep"),
        ("fast", "right", "large"),
        ("right/fast", "right", "large"),
        ("left/unlisted", "left", "unlisted"),
    ],
)
async def test_a_name_leads_to_an_upstream(
    over: Over,
    left: ScriptedUpstream,
    right: ScriptedUpstream,
    model: str,
    name: str,
    asked: str,
) -> None:
    driver = await over(at("left", left), at("right", right, aliases={"fast": "large"}))
    body = await driver.answer("echo hi", model=model)
    assert body["model"] == model
    servers = {"left": left, "right": right}
    assert [sent["model"] for sent in await servers.pop(name).received()] == [asked]
    [other] = servers.values()
    assert await other.received() == []


# proves R12
async def test_patterns_say_what_an_upstream_is_asked_for(
    over: Over, left: ScriptedUpstream, right: ScriptedUpstream
) -> None:
    driver = await over(
        at("left", left, models=["small*"]), at("right", right, models=["large", "bo*"])
    )
    await driver.answer("echo hi", model="small-unlisted")
    await driver.answer("echo hi", model="both")
    assert [sent["model"] for sent in await left.received()] == ["small-unlisted"]
    assert [sent["model"] for sent in await right.received()] == ["both"]
    with pytest.raises(WireError, match=r"There are: small, large, both\. See"):
        await driver.ask("echo hi", model="left/both")


# proves R12
async def test_all_models_are_listed_and_each_leads_to_its_owner(
    over: Over, left: ScriptedUpstream, right: ScriptedUpstream
) -> None:
    driver = await over(
        at("left", left), at("right", right, aliases={"fast": "large", "small": "both"})
    )
    offered = {one.id: one.owned_by for one in await driver.node.gateway.models()}
    assert offered == {
        "left/small": "left",
        "both": "left",
        "fast": "right",
        "small": "right",
        "large": "right",
        "right/both": "right",
        "org/deep": "right",
    }
    for id, owner in offered.items():
        target = await driver.node.upstreams.resolve(id)
        assert target.upstream.url == {"left": left.url, "right": right.url}[owner]


# proves R12
async def test_an_unknown_model_is_refused_by_what_there_is_before_anything_is_stored(
    over: Over, left: ScriptedUpstream
) -> None:
    driver = await over(at("left", left), at("again", left))
    with pytest.raises(WireError) as refused:
        await driver.ask("echo hi", model="huge")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert "small, both, again/small, again/both" in str(refused.value)
    assert driver.node.gateway.stats.started == 0


# proves R12
async def test_one_that_is_unreachable_hides_nothing_of_the_others(
    over: Over, left: ScriptedUpstream
) -> None:
    gone = {"name": "gone", "url": unused_url(), "aliases": {"lost": "x"}}
    driver = await over(gone, at("left", left))
    assert [one.id for one in await driver.node.gateway.models()] == ["lost", "small", "both"]
    assert (await driver.answer("echo hi", model="small"))["status"] == "completed"
    with pytest.raises(UpstreamFailed, match=r"'gone' does not: .* did not list its models"):
        await driver.ask("echo hi", model="perhaps-there")


# proves R12
async def test_models_of_one_that_fell_silent_still_lead_to_it(over: Over) -> None:
    async with ScriptedUpstream(models=("b",)) as other:
        async with ScriptedUpstream(models=("a",)) as silent:
            driver = await over(at("silent", silent, attempts_max=1), at("other", other))
            await driver.answer("echo hi", model="a")
        started = await driver.ask("echo hi", model="a")
        with pytest.raises(UpstreamFailed, match="cannot be reached"):
            await driver.node.gateway.finished(started)


# proves R12, O1
async def test_readiness_depends_on_the_upstreams_that_are_required(
    over: Over, left: ScriptedUpstream
) -> None:
    url = unused_url()
    for required in (False, True):
        gone = {"name": "gone", "url": url, "required": required}
        driver = await over(gone, at("left", left, required=True))

        async def asked(node: Node = driver.node) -> bool:
            return all("not asked" not in check.reason for check in node.readiness().checks)

        await wait_until(asked, 10, "a first probe")
        checks = {check.name: check for check in driver.node.readiness().checks}
        assert driver.node.readiness().ready is not required
        assert checks["upstream gone"].ok is not required
        assert url in checks["upstream gone"].reason
        assert checks["upstream left"].ok
