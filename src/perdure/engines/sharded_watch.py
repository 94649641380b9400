"""Watching the shards: who does not answer is known before anybody asks for what lives there, and
a store that was down when the others were opened is joined when it is back.

Which shard such a store is, it says itself once it is open. Only then it is used, and only if it is
what a start would have taken: a shard of this whole or a new and empty one, not given already, and
as durable as was promised. Until then whatever keeps it out is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from perdure.core.engine import Survives
from perdure.core.errors import PerdureError, PromiseBroken, WrongShards
from perdure.core.layouts import Layout
from perdure.engines.sharded_map import Absent, Shard, admit, require_given
from perdure.engines.sharded_places import Places

WATCH_S = 2.0
"""How long after a look at a shard the next one begins."""


class Watch:
    """Looks at each shard again and again, and joins the absent. What was announced to whoever
    looks who holds the stores is announced to those that come later too."""

    def __init__(self, places: Places, layouts: Sequence[Layout], survives: Survives) -> None:
        self.note = ""
        self._places = places
        self._layouts = layouts
        self._survives = survives
        self._looking: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Look from now on, until `end`."""
        present = [self._look(shard) for shard in self._places.shards.values()]
        absent = [self._await(absent) for absent in self._places.absent]
        self._looking = [asyncio.create_task(work) for work in (*present, *absent)]

    async def end(self) -> None:
        """Look no more; nothing is opened after this."""
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)

    async def _look(self, shard: Shard) -> None:
        while True:
            try:
                await self._places.look(shard)
                await shard.count_left()
                shard.down = None
            except PerdureError as error:
                shard.down = str(error)
            await self._places.clock.sleep(WATCH_S)

    async def _await(self, absent: Absent) -> None:
        while True:
            await self._places.clock.sleep(WATCH_S)
            try:
                shard = await self.join(absent)
            except PerdureError as error:
                absent.why = error
            else:
                return await self._look(shard)

    async def join(self, absent: Absent) -> Shard:
        """Open a store that was down, and take it among the shards. Raises what `open_engine` and
        `assemble` raise for one that cannot be."""
        places = self._places
        async with AsyncExitStack() as opened:
            engine = await absent.open()
            opened.push_async_callback(engine.close)
            shard = Shard(engine)
            await places.look(shard)
            if shard.id in places.shards:
                raise WrongShards(f"{shard.name} is given a second time; give each of them once.")
            await admit(shard, places.map, self._layouts)
            present = (*places.shards.values(), shard)
            require_given(places.map, present, len(places.absent) - 1)
            self._require_as_durable(shard)
            if shard.id in places.map.every:
                await places.tell_one(shard, places.map)
            engine.announce(self.note)
            places.shards[shard.id] = shard
            places.absent.remove(absent)
            opened.pop_all()
        return shard

    def _require_as_durable(self, shard: Shard) -> None:
        lacking = [
            what
            for what in Survives.__struct_fields__
            if getattr(self._survives, what) and not getattr(shard.engine.survives, what)
        ]
        if lacking or (self._places.shared and not shard.engine.shared):
            what = ", ".join(lacking) or "several processes"
            raise PromiseBroken(
                f"{shard.name} was down at the start and does not survive {what}, as the others "
                "do. Make it as they are, or remove it from the list."
            )
