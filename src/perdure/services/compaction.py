"""Compacts a conversation: the upstream summarises it, and the summary stands for it from then on.

Nothing of it is stored here. The one item that comes back holds the summary itself and is sealed
(services/sealing.py), so it can be sent as input to any process over this store, after any restart.
"""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.core.clock import Clock
from perdure.services.bridge import chat_request
from perdure.services.context import Context
from perdure.services.conversations import resolve_items
from perdure.services.extract import MODEL
from perdure.services.gateway import Gateway
from perdure.services.sealing import Sealing
from perdure.services.tokens import estimated, estimated_text
from perdure.services.upstream import UpstreamFailed
from perdure.surfaces.state import State
from perdure.wire.compaction import Compaction, parse_compact
from perdure.wire.errors import WireError
from perdure.wire.fold import View
from perdure.wire.items import KINDS, Item, sound_items, text_of
from perdure.wire.responses import CreateResponse, Outcome

ASSIGNMENT = (
    "Summarize our conversation so far, so that the summary can replace it and the work can go on "
    "without anything else. Keep what was asked for and why, every decision and constraint, names, "
    "numbers, identifiers and code that are still needed, results of tools, and what is open and "
    "comes next. Leave out what has been settled and is needed no more. Write in the language of "
    "the conversation. Answer with the summary alone."
)


class Compacted(msgspec.Struct, frozen=True):
    """The answer, and whether its usage was counted by the upstream."""

    answer: Compaction
    counted: bool


class Compactor:
    """Compacts for one state. `writes` says whether there is a model that can write."""

    def __init__(
        self,
        state: State,
        gateway: Gateway,
        context: Context,
        sealing: Sealing,
        clock: Clock,
        *,
        writes: bool,
    ) -> None:
        self._state = state
        self._context = context
        self._gateway = gateway
        self._sealing = sealing
        self._clock = clock
        self._writes = writes

    async def compact(self, tenant: str, sent: Any) -> Compacted:
        """Have `sent`, and what it builds on, summarised. Raises `WireError` and `NotFound` as
        creating a response of it would, and `UpstreamFailed` where no whole summary came."""
        request = parse_compact(sent)
        if not self._writes:
            raise WireError(
                f"Compacting needs a model that writes, and '{MODEL}' only quotes. Start a model "
                "server and serve with --upstream URL.",
                param="model",
                code="unsupported_value",
            )
        items = sound_items(request.input or [], self._clock)
        items = await resolve_items(self._state, tenant, items)
        given = await self._context.given(tenant, request, items)
        items = [*given.items, *sound_items(ASSIGNMENT, self._clock)]
        view, outcome = await self._gateway.ask_aside(request, given.history, items)
        summary = _summary(view, outcome)
        compaction = {
            "id": self._clock.new_id(KINDS["compaction"].prefix),
            "type": "compaction",
            "encrypted_content": await self._sealing.sealed(tenant, summary),
        }
        answer = Compaction(
            id=self._clock.new_id("resp"),
            created_at=int(self._clock.now_s()),
            output=[compaction],
            usage=outcome.usage or _estimate(request, given.history, items, summary),
        )
        return Compacted(answer, outcome.usage is not None)


def _summary(view: View, outcome: Outcome) -> str:
    """Everything the model said. A summary that was cut short would lose its end for good."""
    said = [text_of(item) for item in view.output() if item["type"] == "message"]
    summary = "\n".join(filter(None, said))
    if outcome.status == "completed" and summary:
        return summary
    why = "it wrote nothing"
    if outcome.error is not None:
        why = outcome.error["message"]
    elif outcome.incomplete_details is not None:
        why = f"it was cut short by {outcome.incomplete_details['reason']}"
    raise UpstreamFailed(f"the upstream gave no whole summary: {why}")


def _estimate(
    request: CreateResponse, history: list[Item], items: list[Item], summary: str
) -> dict[str, Any]:
    asked = chat_request(request, history, items, model=request.model)
    read, written = estimated(asked), estimated_text(summary)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
