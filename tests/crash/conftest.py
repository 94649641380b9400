"""One upstream and one launcher for all tests of a module; every campaign has its own data."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from perdure.proving.campaign import Campaign, Stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


def violations(campaign: Campaign) -> list[str]:
    """What did not hold, for an assertion that shows it."""
    return list(dict.fromkeys(map(str, campaign.verdict.violations)))
