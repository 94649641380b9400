"""What people see of an address holds no password, wherever it stood."""

import pytest

from perdure.core.addresses import without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:s@cret@db:5432/x?schema=y", "postgresql://db:5432/x?schema=y"),
        (
            "postgresql://db/x?user=u&password=secret&sslmode=require",
            "postgresql://db/x?sslmode=require",
        ),
        ("postgres://u:secret@a:1,b:2/x", "postgres://a:1,b:2/x"),
        ("postgrse://u:secret@db", "postgrse://db"),
        ("sqlite:///a@b?c/state.db", "sqlite:///a@b?c/state.db"),
        ("memory://", "memory://"),
        ("state.db", "state.db"),
    ],
)
def test_credentials_are_left_out(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
