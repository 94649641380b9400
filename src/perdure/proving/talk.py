"""A conversation as a thing that several clients change at once: what each request may have done.

The requests of all clients are one history for `linear`: some order of them, each at a moment
between its call and its answer, must explain every answer.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace


class Talk(msgspec.Struct, frozen=True):
    """The whole conversation: what describes it, the texts of its items, and the keys of requests
    that were carried out."""

    metadata: str = ""
    items: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked and was told; `called` and `returned` are moments on one clock.

    `describe` replaces the metadata by `text`; `add` adds it as an item, once for each `key`, and
    `remove` takes that item out (`absent`: there was none). `metadata` and `items` are reads of
    what was `found`. `unknown` is a request without an answer.
    """

    verb: Literal["describe", "add", "remove", "metadata", "items"]
    told: Literal["done", "absent", "unknown"] = "unknown"
    text: str = ""
    key: str | None = None
    found: tuple[str, ...] = ()
    called: int = 0
    returned: int | None = None

    def after(self, talk: Talk) -> Talk | None:
        """The conversation after it; None if it cannot have been told so of that one."""
        match self.verb:
            case "describe":
                return replace(talk, metadata=self.text)
            case "add":
                return self._added(talk)
            case "remove":
                return self._removed(talk)
            case "metadata":
                return talk if self.found == (talk.metadata,) else None
            case "items":
                return talk if self.found == talk.items else None

    def _added(self, talk: Talk) -> Talk:
        if self.key is None:
            return replace(talk, items=(*talk.items, self.text))
        if self.key in talk.keys:
            return talk
        return replace(talk, items=(*talk.items, self.text), keys=talk.keys | {self.key})

    def _removed(self, talk: Talk) -> Talk | None:
        there = self.text in talk.items
        if self.told != "unknown" and there != (self.told == "done"):
            return None
        return replace(talk, items=tuple(text for text in talk.items if text != self.text))
