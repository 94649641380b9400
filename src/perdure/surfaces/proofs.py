"""Which tests prove which statement: made by `make docs`, read wherever promises are listed."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import msgspec

from perdure.core.promises import Promise


@cache
def proofs() -> dict[str, tuple[str, ...]]:
    """Statement ids to the ids of the tests that prove them."""
    data = files("perdure.surfaces").joinpath("proofs.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, tuple[str, ...]])


def proofs_of(promise: Promise) -> dict[str, tuple[str, ...]]:
    """The same for the statements that one surface relies on."""
    return {name: proofs().get(name, ()) for name in promise.statements}
