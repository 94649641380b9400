"""Recovery past damage: what cannot be read is named, what can be is recovered."""

from __future__ import annotations

from pathlib import Path

import apsw
import msgspec
import pytest

from perdure.core.keys import join, show
from perdure.surfaces.boots import SYSTEM_TENANT
from tests.services.conftest import Open
from tests.services.test_recovery import Deaf, die


@pytest.fixture
def engine_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'perdure.db'}"


# proves C7
async def test_a_damaged_response_is_named_and_the_others_are_recovered(
    opened: Open, tmp_path: Path
) -> None:
    first = await opened(wrap=Deaf)
    started = [await first.ask("hang 1") for _ in range(3)]
    await die(first.node)
    hurt = sorted(one.key for one in started)[1]
    connection = apsw.Connection(str(tmp_path / "perdure.db"), vfs="cksmvfs")
    connection.execute(
        "UPDATE records_responses SET attachment = zeroblob(9) WHERE key = ?", (join(hurt),)
    )
    connection.close()
    second = await opened()
    found = {one.surface: one for one in second.node.boot.recovery}["responses"]
    assert (found.interrupted, found.damaged) == (2, 1)
    assert hurt[-1] in found.findings[0].where
    assert any(hurt[-1] in warning for warning in second.node.readiness().warnings)
    for one in started:
        if one.key != hurt:
            held = await second.node.state.responses.get(*one.key)
            assert msgspec.json.decode(held.attachment or b"")["status"] == "failed"
    second.node.opened = False
    await second.node._supervisor.stop()
    await second.node.upstreams.close()
    await second.node.state.engine.close()


# proves C7
async def test_a_damaged_boot_is_named_and_keeps_no_server_from_starting(
    opened: Open, tmp_path: Path
) -> None:
    """The number of a boot was that of the last one and one more, so a server whose last boot could
    not be read did not start again."""
    for _ in range(2):
        node = (await opened()).node
        hurt = (SYSTEM_TENANT, node.boot.instance_id, f"{node.boot.number:010d}")
        await node.close()
    connection = apsw.Connection(str(tmp_path / "perdure.db"), vfs="cksmvfs")
    connection.execute("UPDATE records_boots SET value = zeroblob(9) WHERE key = ?", (join(hurt),))
    connection.close()
    node = (await opened()).node
    told = {one.surface: one for one in node.boot.recovery}["boots"]
    assert (node.boot.number, node.boot.previous_boot_id) == (3, None)
    assert node.boot.previous_ended_clean is False
    assert [finding.where for finding in told.findings] == [f"boots {show(hurt)}"]
    assert any(show(hurt) in warning for warning in node.readiness().warnings)
    await node.close()
