"""The rules of `core.engine`, each a named check: chapters for commits, logs, scans, moving and
lifetimes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from perdure.proving.subject import Store

Check = Callable[[Store], Awaitable[None]]


class Rule(msgspec.Struct, frozen=True):
    """One rule: its name says what must hold. `durable` rules reopen the store, so they apply to
    engines that survive a crash of the process; `damaging` ones need `Subject.damage`, `copying`
    ones `Subject.copy`."""

    name: str
    statements: tuple[str, ...]
    check: Check
    durable: bool = False
    damaging: bool = False
    copying: bool = False


class Chapter:
    """Rules about one thing, in the order in which they are written down."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def rule(
        self,
        *statements: str,
        durable: bool = False,
        damaging: bool = False,
        copying: bool = False,
    ) -> Callable[[Check], Check]:
        """Add the check below as a rule that proves `statements`."""

        def add(check: Check) -> Check:
            name = check.__name__.replace("_", " ")
            self.rules.append(Rule(name, statements, check, durable, damaging, copying))
            return check

        return add
