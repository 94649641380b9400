"""The circuit breaker alone, on a clock of the test's, and around a real upstream."""

from __future__ import annotations

import pytest

from perdure.core.clock import SystemClock
from perdure.core.errors import Unavailable
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.breaker import FAILURES_MAX, PAUSE_FIRST_S, PAUSE_MAX_S, Breaker
from perdure.services.upstream import CircuitOpen, UpstreamFailed
from tests.services.conftest import Driver, Over, at


class Hand(SystemClock):
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s = 0.0

    def monotonic_s(self) -> float:
        return self.at_s


def opened(clock: Hand) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES_MAX):
        assert breaker.admit()
        breaker.failed()
    return breaker


# proves R12
def test_failures_in_a_row_open_it_and_a_success_in_between_does_not() -> None:
    breaker = Breaker(Hand())
    for _ in range(FAILURES_MAX - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES_MAX - 1):
        breaker.failed()
    assert breaker.admit()
    assert not breaker.open
    breaker.failed()
    assert not breaker.admit()
    assert breaker.wait_s() == PAUSE_FIRST_S


# proves R12
def test_after_the_pause_one_request_finds_out_for_all() -> None:
    clock = Hand()
    breaker = opened(clock)
    clock.at_s += PAUSE_FIRST_S
    assert [breaker.admit() for _ in range(3)] == [True, False, False]
    breaker.started()
    assert [breaker.admit() for _ in range(3)] == [True, True, True]
    breaker.failed()
    assert not breaker.admit()
    clock.at_s += 2 * PAUSE_FIRST_S
    assert breaker.admit()
    breaker.succeeded()
    assert (breaker.open, breaker.failures, breaker.opened) == (False, 0, 2)


# proves R12
def test_pauses_grow_to_a_bound_and_one_that_never_says_does_not_block() -> None:
    clock = Hand()
    breaker = opened(clock)
    for _ in range(10):
        clock.at_s += breaker.wait_s()
        assert breaker.admit()
        breaker.failed()
    assert breaker.wait_s() == PAUSE_MAX_S
    clock.at_s += breaker.wait_s()
    assert breaker.admit()
    clock.at_s += PAUSE_MAX_S
    assert breaker.admit()


async def ended(driver: Driver, said: str) -> None:
    started = await driver.ask(said)
    await driver.node.gateway.finished(started)


# proves R12
async def test_an_upstream_that_only_fails_is_left_alone_until_it_answers(
    over: Over, upstream: ScriptedUpstream
) -> None:
    clock = Hand()
    driver = await over(at("up", upstream, attempts_max=1, required=True), clock=clock)
    for _ in range(FAILURES_MAX):
        with pytest.raises(UpstreamFailed, match="answered 503"):
            await ended(driver, "fail 503")
    sent = len(await upstream.received())
    with pytest.raises(CircuitOpen, match=r"failed 5 times in a row.*answered 503") as refused:
        await ended(driver, "echo hi")
    assert isinstance(refused.value, Unavailable)
    assert refused.value.status == 503
    assert refused.value.retry_after_ms == PAUSE_FIRST_S * 1000
    assert len(await upstream.received()) == sent
    [check] = [check for check in driver.node.readiness().checks if check.name == "upstream"]
    assert not check.ok
    assert "left alone" in check.reason
    clock.at_s += PAUSE_FIRST_S
    await ended(driver, "echo hi")
    assert not driver.node.upstreams.members[0].upstream.breaker.open


# proves R12
@pytest.mark.parametrize("said", ["fail 400", "fail 429", "fail after 1", "length 1"])
async def test_what_an_upstream_answers_does_not_open_it(
    over: Over, upstream: ScriptedUpstream, said: str
) -> None:
    driver = await over(at("up", upstream, attempts_max=1))
    for _ in range(FAILURES_MAX + 1):
        started = await driver.ask(said, stream=True)
        assert await driver.events(started)
    assert driver.node.upstreams.members[0].upstream.breaker.failures == 0


# proves R12
async def test_broken_streams_open_it_too(over: Over, upstream: ScriptedUpstream) -> None:
    driver = await over(at("up", upstream))
    for _ in range(FAILURES_MAX):
        assert (await driver.answer("cut 1"))["status"] == "failed"
    with pytest.raises(CircuitOpen, match="broke off"):
        await driver.ask("echo hi")


# proves R12
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_connections_carry_one_answer_after_the_other(
    over: Over, upstream: ScriptedUpstream, api: str
) -> None:
    driver = await over(at("up", upstream, api=api))
    for said in ("count 3", "whole one two", "tool f {}", "count 500", "fail 400", "count 2"):
        started = await driver.ask(said, stream=True)
        assert await driver.events(started)
    assert await upstream.connections() <= 2  # the other may be that of the list of models
