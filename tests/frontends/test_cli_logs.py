"""What the server logs: JSON lines, and of an exception never its words."""

from __future__ import annotations

import logging

import msgspec
import pytest
import structlog

from perdure.frontends.cli.serve import _configure_logs


# proves O6
def test_an_exception_is_logged_by_type_and_place_only(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        _configure_logs()
        try:
            raise KeyError("a private word")
        except KeyError:
            structlog.get_logger("test").exception("work crashed", work="testing")
            logging.getLogger("library").exception("it failed")
    finally:
        root.handlers[:], root.level = before
        structlog.reset_defaults()
    told = capsys.readouterr().err
    lines = [msgspec.json.decode(line) for line in told.splitlines()]
    assert [line["event"] for line in lines] == ["work crashed", "it failed"]
    assert lines[0]["error"] == "KeyError"
    assert __file__ in lines[0]["at"][-1]
    assert "private" not in told
