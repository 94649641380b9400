"""The registry: every surface over one engine, as one typed class.

A new surface is one module, one line here and one routes module.
"""

from __future__ import annotations

from perdure.core.batch import Batch
from perdure.core.engine import Engine
from perdure.core.layouts import Layout
from perdure.core.promises import Promise
from perdure.core.values import Committed
from perdure.surfaces.blobs import BlobUses
from perdure.surfaces.boots import Boots
from perdure.surfaces.conversations import Conversations
from perdure.surfaces.files import Files, Uploads
from perdure.surfaces.idempotency import Idempotency
from perdure.surfaces.items import Items
from perdure.surfaces.jobs import Jobs
from perdure.surfaces.responses import Responses
from perdure.surfaces.retentions import Retentions
from perdure.surfaces.seals import Seals
from perdure.surfaces.workers import Workers

PROMISES: tuple[Promise, ...] = (
    Responses.promise,
    Jobs.promise,
    Conversations.promise,
    Items.promise,
    Files.promise,
    BlobUses.promise,
    Idempotency.promise,
    Seals.promise,
    Workers.promise,
    Workers.views,
    Retentions.promise,
    Boots.promise,
)
LAYOUTS: tuple[Layout, ...] = tuple(
    dict.fromkeys(layout for promise in PROMISES for layout in promise.layouts)
)


class State:
    """Surfaces read through their methods; their writes are batches, which add, and go through
    `commit`, the one door."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.items = Items(engine)
        self.responses = Responses(engine)
        self.jobs = Jobs(engine)
        self.conversations = Conversations(engine)
        self.files = Files(engine)
        self.uploads = Uploads(engine)
        self.idempotency = Idempotency(engine)
        self.seals = Seals(engine)
        self.runtimes = Workers(engine)
        self.retentions = Retentions(engine)
        self.boots = Boots(engine)

    async def commit(self, batch: Batch) -> Committed:
        """See `core.engine.Engine.commit`."""
        return await self.engine.commit(batch)
