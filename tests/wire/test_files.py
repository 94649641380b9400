"""What may be said of a file, and what is refused by name."""

from __future__ import annotations

import pytest

from perdure.wire.errors import WireError
from perdure.wire.files import CreateFile, check_filename, parse_create_file

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


def test_a_file_is_described_by_its_form() -> None:
    assert parse_create_file({"purpose": "batch"}, "a") == CreateFile("a", "batch", None)
    timed = {"purpose": "vision", ANCHOR: "created_at", SECONDS: "2592000"}
    assert parse_create_file(timed, "a") == CreateFile("a", "vision", 2_592_000)


# proves R10
@pytest.mark.parametrize(
    ("fields", "filename", "param", "code"),
    [
        ({"purpose": "batch"}, None, "file", "missing_required_parameter"),
        ({}, "a", "purpose", "missing_required_parameter"),
        ({"purpose": ""}, "a", "purpose", "invalid_value"),
        ({"purpose": "batch", "colour": "red"}, "a", "colour", "unknown_parameter"),
        ({"purpose": "batch", ANCHOR: "created_at"}, "a", SECONDS, "missing_required_parameter"),
        ({"purpose": "batch", ANCHOR: "now", SECONDS: "3600"}, "a", ANCHOR, "invalid_value"),
        ({"purpose": "batch", ANCHOR: "created_at", SECONDS: "1e4"}, "a", SECONDS, "invalid_type"),
        ({"purpose": "batch", ANCHOR: "created_at", SECONDS: "٣٦٠٠"}, "a", SECONDS, "invalid_type"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    fields: dict[str, str], filename: str | None, param: str, code: str
) -> None:
    with pytest.raises(WireError) as refused:
        parse_create_file(fields, filename)
    assert (refused.value.param, refused.value.code) == (param, code)


@pytest.mark.parametrize("filename", ["", "a\0b", "a\nb", "a\x7f", "a\x85", "\ud800", "x" * 1_025])
def test_a_name_that_cannot_be_shown_is_refused(filename: str) -> None:
    with pytest.raises(WireError):
        check_filename(filename, "file")


@pytest.mark.parametrize("filename", ["..", "/etc/passwd", "é.txt", "🗎", "a" * 1_024, " "])
def test_any_other_name_is_kept(filename: str) -> None:
    assert check_filename(filename, "file") == filename
