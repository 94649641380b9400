"""A store that cannot be written: an engine that cannot even be looked at there is caught, and the
operator's commands work."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.drills.read_only import LookedAtEngine, ReadOnlyExt4, mounted_read_only
from tests.e2e.http_server import clean_environment, serving

WRONG = (sys.executable, str(Path(__file__).with_name("wrong_looker.py")))
LACKS = LookedAtEngine().lacks()
NO_IMAGES = ReadOnlyExt4().lacks()

needs_mounts = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


@needs_mounts
@pytest.mark.parametrize("subject", ["process", "files-process"])
async def test_a_look_that_needs_the_right_to_write_is_caught(
    subject: Subject, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, "1", seconds=30)
    await LookedAtEngine(WRONG, subject).run(trial)
    assert len(trial.violations) == 4
    assert all("not readable" in one.what for one in trial.violations)


@pytest.mark.skipif(NO_IMAGES is not None, reason=str(NO_IMAGES))
@pytest.mark.parametrize(
    "drill",
    [
        ReadOnlyExt4("tests.proving.wrong_writer", "deaf"),
        ReadOnlyExt4("perdure.proving.planted_files", "deaf", subject="files-ext4"),
    ],
    ids=lambda drill: drill.subject,
)
async def test_a_writer_that_acknowledges_what_a_read_only_disk_refused_is_caught(
    drill: ReadOnlyExt4, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, "1", seconds=30, wrong_max=1)
    await drill.run(trial)
    assert any("did not end by a refusal" in one.what for one in trial.violations)
    assert any("steps acknowledged" in one.what for one in trial.violations)


@needs_mounts
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_status_verify_and_contract_read_a_store_that_nobody_can_write(
    tmp_path: Path, end: signal.Signals
) -> None:
    """They needed a lock file to write to, and shared memory that SQLite could not make."""
    data = tmp_path / "data"
    async with serving(data) as server:
        async with server.client() as asking:
            assert (await asking.post("/v1/conversations", json={})).status_code == 200
        await server.end(end)

    async def perdure(*arguments: str) -> tuple[int, str]:
        command = (sys.executable, "-m", "perdure.frontends.cli.main", *arguments)
        running = await asyncio.create_subprocess_exec(
            *mounted_read_only(data, *command, "--data", str(data)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=clean_environment(),
        )
        said, _ = await asyncio.wait_for(running.communicate(), 30)
        return await running.wait(), said.decode()

    code, said = await perdure("status")
    assert code == 3, said
    assert ("ended clean" if end == signal.SIGTERM else "it was killed") in said
    assert await perdure("verify") == (0, "nothing is damaged\n")
    code, said = await perdure("contract")
    assert code == 0, said
    code, said = await perdure("serve", "--port", "0")
    assert code == 5
    assert "Read-only file system. It can be looked at" in said
