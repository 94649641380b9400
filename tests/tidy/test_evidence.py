"""The evidence page is what its run and the track record make of it, and says what went wrong."""

from __future__ import annotations

import msgspec

from docs import evidence
from docs.evidence import ROOT, Caught, Run, read_record, read_run, render
from perdure.proving.drills.drill import Violation


def changed(run: Run, **what: object) -> Run:
    return msgspec.structs.replace(run, **what)


def test_the_page_is_what_its_run_makes_of_it() -> None:
    again = "run `python -m docs.evidence --render`"
    assert (ROOT / evidence.PAGE).read_text() == render(read_run(), read_record()), again


def test_the_run_that_is_published_held_and_was_long_enough() -> None:
    run = read_run()
    assert run.ok
    assert not run.changed, "the evidence is of a state that is in no commit"
    assert len(run.caught) >= 15
    assert sum(row.cases for row in run.rows) > 500


def test_what_the_track_record_names_is_there() -> None:
    for found in read_record():
        path, _, name = found.test.partition("::")
        assert (ROOT / path).is_file(), found.test
        assert f"def {name}(" in (ROOT / path).read_text() or not name, found.test


def test_a_violation_and_a_bug_that_nothing_catches_are_shown_and_fail() -> None:
    run = read_run()
    violation = Violation(7, "a step is lost", "")
    broken = msgspec.structs.replace(run.rows[0], violations=(violation,))
    missed = Caught("never syncs", "engine", "nothing", None, 0.1)
    for bad, says in (
        (changed(run, rows=(broken,)), "VIOLATED, case 7: a step is lost"),
        (changed(run, caught=(missed,)), "**not caught**"),
        (changed(run, changed=True), "changes that are not committed"),
    ):
        assert says in render(bad, [])
    assert not changed(run, rows=(broken,)).ok
    assert not changed(run, caught=(missed,)).ok


def test_what_could_not_be_tested_is_said_with_its_reason() -> None:
    run = read_run()
    row = msgspec.structs.replace(run.rows[0], cases=0, lacks="it needs root.")
    page = render(changed(run, rows=(row,)), [])
    assert "not tested here" in page
    assert "Not tested here: it needs root." in page


def test_what_no_drill_does_is_said_until_one_does_it() -> None:
    run = read_run()
    row = msgspec.structs.replace(run.rows[0], fault="slow-disk", subject="blobs")
    assert "  - slow-disk / blobs\n" in render(changed(run, rows=run.rows[:1]), [])
    assert "  - slow-disk / blobs\n" not in render(changed(run, rows=(row,)), [])
    assert "  - slow-disk / engine\n" in render(changed(run, rows=(row,)), [])
