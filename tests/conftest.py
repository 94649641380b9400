"""What every test runs under: property tests that repeat exactly, and no clock that fails them.

The summary names the engines that rules ran on, so that no run can quietly prove the wrong thing.
It counts what tests report, wherever they ran: with `-n` that is in other processes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

from perdure.proving.postgres import remove_shared
from perdure.proving.s3 import KEYS, Server, serving_s3

# What tests import and start is compiled once, as it is wherever people run it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("repeat", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("PERDURE_HYPOTHESIS", "repeat"))

PROVEN_ON = "engine that a rule holds on"
"""The property under which a test of the conformance suite reports its engine."""


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server for whoever keeps blobs in it, each under a prefix of its own."""
    with serving_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, key in KEYS.items():
            patch.setenv(name, key)
        yield server


def pytest_sessionfinish() -> None:
    remove_shared()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = Counter(
        engine
        for report in terminalreporter.stats.get("passed", ())
        for name, engine in report.user_properties
        if name == PROVEN_ON
    )
    if ran:
        proven = ", ".join(f"{engine} ({count} rules)" for engine, count in sorted(ran.items()))
        terminalreporter.write_line(f"engine conformance ran on: {proven}")
