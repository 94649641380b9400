"""Several upstreams: which of them a model's name leads to, and what one that is silent hides."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.breaker import FAILURES_MAX
from perdure.services.lifecycle import Node
from perdure.services.passing import pass_chat
from perdure.services.upstream import CircuitOpen, UpstreamFailed
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
    with pytest.raises(WireError, match=r"There are: small, large, both\. Asked"):
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
        target = (await driver.node.upstreams.resolve(id))[0]
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


def dead(name: str, **more: Any) -> dict[str, Any]:
    """An upstream that nobody answers at."""
    return {"name": name, "url": unused_url(), "attempts_max": 1, **more}


# proves R12
@pytest.mark.parametrize("api", ["chat", "responses", "auto"])
async def test_another_that_has_the_model_answers_for_one_that_is_away(
    over: Over, left: ScriptedUpstream, right: ScriptedUpstream, api: str
) -> None:
    asked_for = {"models": ["both", "la*"], "api": api}
    driver = await over(dead("gone", **asked_for), at("left", left), at("right", right))
    gone = driver.node.upstreams.members[0].upstream
    answer = await driver.answer("count 3", model="both")
    assert answer["output"][0]["content"][0]["text"] == "1 2 3"
    assert len(await left.received()) == 1
    assert await right.received() == []
    started = await driver.ask("count 2", model="large", background=True)
    assert (await driver.events(started))[-1]["type"] == "response.completed"
    assert len(await right.received()) == 1
    request = {"model": "both", "messages": [{"role": "user", "content": "echo hi"}]}
    passage = await pass_chat(driver.node.upstreams, request, msgspec.json.encode(request))
    assert b"hi" in b"".join([part async for group in passage.groups for part in group])
    for _ in range(FAILURES_MAX):
        await driver.answer("echo again", model="both")
    failures = gone.stats.failures
    assert gone.resting() is not None
    assert (await driver.answer("echo rested", model="both"))["status"] == "completed"
    assert gone.stats.failures == failures, "one that is left alone was asked"


# proves R12
async def test_an_answer_that_has_begun_is_nobody_elses(
    over: Over, left: ScriptedUpstream, right: ScriptedUpstream
) -> None:
    driver = await over(at("left", left), at("right", right))
    for prompt in ("cut 0", "cut 2"):
        started = await driver.ask(prompt, model="both")
        last = (await driver.events(started))[-1]
        assert last["type"] == "response.failed", prompt
    with pytest.raises(UpstreamFailed):
        await driver.answer("fail 400", model="both")
    assert await right.received() == []


# proves R12
async def test_where_all_are_away_the_first_one_s_failure_is_told(over: Over) -> None:
    driver = await over(dead("one", models=["m"]), dead("two", models=["m"]))
    one, two = (member.upstream for member in driver.node.upstreams.members)
    for _ in range(FAILURES_MAX):
        with pytest.raises(UpstreamFailed, match=one.url):
            await driver.answer("echo hi", model="m")
    assert (one.stats.failures, two.stats.failures) == (FAILURES_MAX, FAILURES_MAX)
    with pytest.raises(CircuitOpen, match=one.url):
        await driver.ask("echo hi", model="m")


# proves R7
async def test_an_unknown_model_is_told_what_the_configuration_asks_for(
    over: Over, left: ScriptedUpstream
) -> None:
    driver = await over(at("left", left), dead("gpu", models=["qwen*", "llama-3"]))
    with pytest.raises(WireError, match=r"gpu: qwen\*, llama-3\.") as refused:
        await driver.ask("hi", model="mistral")
    assert "small" in str(refused.value)
