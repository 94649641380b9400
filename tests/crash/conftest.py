"""One upstream and one launcher for all tests of a module; every campaign has its own data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from perdure.proving.campaign import Stage
from perdure.proving.judging import Judging
from perdure.proving.launcher import Death, Plan
from perdure.proving.snapshot import Snapshot
from perdure.proving.victim import Victim
from perdure.services.continuing import Continues


class Place:
    """One data directory, and the servers that come and go over it."""

    def __init__(self, stage: Stage, home: Path, continues: Continues = "no") -> None:
        self.stage = stage
        self.home = home
        self.continues = continues
        self.victim: Victim

    async def start(self, death: Death | None = None) -> None:
        assert await self.born(death)

    async def born(self, death: Death | None) -> bool:
        """Start a server; whether it became ready before it died."""
        self.victim = await self.stage.nursery.start(
            Plan(
                data=str(self.home / "data"),
                port=self.stage.port,
                upstream=self.stage.upstream.url,
                continues=self.continues,
                death=death,
            )
        )
        return await self.victim.ready() is not None

    async def restart_when_dead(self) -> None:
        await self.victim.death()
        await self.start()

    async def stop(self) -> Snapshot:
        self.victim.signal()
        await self.victim.death()
        return await Snapshot.of(self.home / "data", self.home / "copy", verify=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest_asyncio.fixture(loop_scope="module")
async def place(stage: Stage, tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(stage, tmp_path)
    yield place
    place.victim.signal()
    await place.victim.death()


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(stage: Stage, request: pytest.FixtureRequest) -> AsyncIterator[AsyncOpenAI]:
    """The official client, strict; it retries as often as the module's RETRIES says."""
    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{stage.port}/v1",
        api_key="none",
        max_retries=getattr(request.module, "RETRIES", 0),
        _strict_response_validation=True,
    ) as client:
        yield client


def violations(campaign: Judging) -> list[str]:
    """What did not hold, for an assertion that shows it."""
    return list(dict.fromkeys(map(str, campaign.verdict.violations)))
