"""Prints the engines that rules ran on, so that no run can quietly prove the wrong thing."""

from __future__ import annotations

from collections import Counter

import pytest

RAN: Counter[str] = Counter()


@pytest.fixture
def ran() -> Counter[str]:
    return RAN


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RAN:
        proven = ", ".join(f"{name} ({count} rules)" for name, count in sorted(RAN.items()))
        terminalreporter.write_line(f"engine conformance ran on: {proven}")
