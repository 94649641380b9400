"""The campaign as a command: a verdict, an exit code, and the way to see a violation again."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import msgspec

from perdure.proving.crash import Report
from perdure.proving.oracle import Check


async def crash(*arguments: str) -> tuple[int | None, bytes]:
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.proving.crash", *arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await command.communicate()
    return command.returncode, said


async def test_a_campaign_without_violation_ends_with_0(tmp_path: Path) -> None:
    code, said = await crash("--cycles", "2", "--seed", "3", "--home", str(tmp_path), "--json")
    report = msgspec.json.decode(said, type=Report)
    assert (code, report.ok, report.violations) == (0, True, [])
    assert sum(report.deaths.values()) >= 4
    assert report.judged[Check.KEPT.value] > 20


async def test_a_violation_ends_with_1_and_says_how_to_see_it_again(tmp_path: Path) -> None:
    planted = ("--plant", "always-clean", "--home", str(tmp_path))
    code, said = await crash("--cycles", "9", "--seed", "4", *planted)
    text = said.decode()
    assert code == 1
    assert "VIOLATION  boots: the last server was killed" in text
    again = re.search(r"again +python -m perdure.proving.crash (.*)", text)
    assert again is not None
    assert again[1].endswith("--seed 4 --plant always-clean")
    assert (tmp_path / "history.jsonl").stat().st_size > 0
