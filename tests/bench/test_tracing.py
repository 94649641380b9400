"""The order test can fail: a put told before its fsync is found, however disguised."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tracing import order_of, syncs_between

KEY = "k000001-000007;"
WRITE = f'7 10.1 pwrite64(4, "...{KEY}{{}}", 4096, 56) = 4096'
TOLD = f'8 10.9 write(9, "acknowledged {KEY}", 28) = 28'
SYNC = "7 10.5 fdatasync(4) = 0"
SYNC_BEGUN, SYNC_DONE = "7 10.5 fdatasync(4 <unfinished ...>", "7 10.7 <... fdatasync resumed>) = 0"
WRITE_BEGUN = f'7 10.1 pwrite64(4, "...{KEY}{{}}", 4096, 56 <unfinished ...>'
WRITE_DONE = "7 10.4 <... pwrite64 resumed>) = 4096"


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        ([WRITE, SYNC, TOLD], 0),
        ([WRITE, SYNC_BEGUN, SYNC_DONE, TOLD], 0),
        ([WRITE_BEGUN, WRITE_DONE, SYNC, TOLD], 0),
        ([WRITE, SYNC, WRITE, TOLD], 0),
        ([WRITE, TOLD, SYNC], 1),
        ([SYNC, WRITE, TOLD], 1),
        ([TOLD], 1),
        ([WRITE, SYNC_BEGUN, TOLD, SYNC_DONE], 1),
        ([SYNC_BEGUN, WRITE.replace("7 ", "6 ", 1), SYNC_DONE, TOLD], 1),
        ([WRITE_BEGUN, SYNC.replace("7 ", "6 ", 1), WRITE_DONE, TOLD], 1),
    ],
)
def test_a_put_told_before_its_sync_is_found(tmp_path: Path, lines: list[str], early: int) -> None:
    trace = tmp_path / "trace"
    trace.write_text("\n".join(lines))
    order = order_of(trace)
    assert (order.acknowledged, len(order.early)) == (1, early)


def test_a_sync_counts_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("\n".join([SYNC, WRITE, SYNC_BEGUN, SYNC_DONE, TOLD]))
    assert syncs_between(trace, 10.0, 11.0) == 2
    assert syncs_between(trace, 10.6, 11.0) == 0
