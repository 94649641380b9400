"""Sealing: compaction items carry their summary with them, and are believed only if this server
wrote it.

`encrypted_content` is `perdure1.TEXT.MAC`: the summary, and its HMAC-SHA256 under the tenant's
secret, both in base64. It is readable on purpose (its client has said or been told all of it) and
cannot be changed or made up. What is compared is the whole text that the server would write, so an
item has one valid spelling.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence

from perdure.core.clock import Clock
from perdure.core.errors import Conflict
from perdure.surfaces.seals import Seal
from perdure.surfaces.state import State
from perdure.wire.errors import WireError
from perdure.wire.items import Item

HEAD = "The conversation up to here was replaced by this summary of it:\n\n"

_PURPOSE = "compaction"
_FORMAT = "perdure1"


class Sealing:
    """Seals and opens the compaction items of one state."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock

    async def sealed(self, tenant: str, summary: str) -> str:
        """The `encrypted_content` that stands for a summary, for as long as the store exists."""
        secret = await self._secret(tenant)
        if secret is None:
            fresh = Seal(self._clock.new_id("seal"), int(self._clock.now_s()))
            try:
                await self._state.commit(self._state.seals.make(tenant, _PURPOSE, fresh))
                secret = fresh.secret
            except Conflict:
                secret = await self._secret(tenant)
        assert secret is not None, "a secret that was made first is there"
        return _written(secret, summary)

    async def opened(
        self, tenant: str, items: Sequence[Item], *, at: str | None = None
    ) -> list[Item]:
        """The items as a model can read them: every compaction as the message that it stands for.

        `at` is where they stand in the request, None for earlier turns. Raises `WireError` naming
        an item that this server did not write, or not for this tenant.
        """
        if not any(item["type"] == "compaction" for item in items):
            return list(items)
        secret = await self._secret(tenant)
        return [
            _message(item, _read(secret, item, None if at is None else f"{at}[{place}]"))
            if item["type"] == "compaction"
            else item
            for place, item in enumerate(items)
        ]

    async def _secret(self, tenant: str) -> str | None:
        found = await self._state.seals.find(tenant, _PURPOSE)
        return None if found is None else found.value.secret


def _written(secret: str, summary: str) -> str:
    text = summary.encode()
    mac = hmac.digest(secret.encode(), text, "sha256")
    return f"{_FORMAT}.{urlsafe_b64encode(text).decode()}.{urlsafe_b64encode(mac).decode()}"


def _read(secret: str | None, item: Item, at: str | None) -> str:
    content: str = item["encrypted_content"]
    format, _, rest = content.partition(".")
    if format == _FORMAT and secret is not None and content.isascii():
        try:
            summary = urlsafe_b64decode(rest.partition(".")[0]).decode()
        except (binascii.Error, UnicodeDecodeError):
            summary = ""
        if hmac.compare_digest(_written(secret, summary), content):
            return summary
    where = f"item '{item['id']}'" if at is None else f"'{at}'"
    raise WireError(
        f"The encrypted content of {where} could not be verified: it was changed, or was not "
        "written by this server. Send what POST /v1/responses/compact gave, or the earlier turns.",
        param="input" if at is None else f"{at}.encrypted_content",
        code="invalid_encrypted_content",
    )


def _message(item: Item, summary: str) -> Item:
    """A user's message: some chat templates take a system message at the start only."""
    part = {"type": "input_text", "text": HEAD + summary}
    return {
        "id": item["id"],
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [part],
    }
