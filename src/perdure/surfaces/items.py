"""Items: the messages, calls and outputs that responses and conversations are made of.

An item belongs to a part of an owner (a response's input or output, a conversation's items) and
is kept as the JSON it was sent or generated as. The same item id may stand under several owners:
a response's output also joins its conversation. So an id is looked up through an index, and any
owner that still has it will do; deleting one owner never takes an item from another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Literal

import msgspec

from perdure.core.batch import Batch, delete, join, put
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Damaged, Missing
from perdure.core.keys import Key, show
from perdure.core.layouts import Index, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.paging import Slice, every, page_of
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import NotFound
from perdure.wire.lists import ListQuery, no_such_after

Part = Literal["input", "output", "items"]


class Item(msgspec.Struct, frozen=True):
    """Names an item; its JSON, id included, is the record's attachment, verbatim."""

    id: str
    type: str


class NewItem(msgspec.Struct, frozen=True):
    """An item to be stored: its id, its type, and its JSON text with the id in it."""

    id: str
    type: str
    body: bytes


ITEMS = Records(
    "items",
    Item,
    key=("tenant", "owner", "part", "position"),
    indexes=(Index("by_id", ("id",)),),
)


class Items:
    """Reads of items, and the batches that write them beside the record of their owner."""

    promise = Promise(
        surface="items",
        durability=Durability.SHARED,
        acknowledgement="durable in the same commit as the response or conversation they join",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the writer of the response or conversation",
        recovery="none needed: an item and its owner's record are one commit",
        retention="as long as their response; those of a conversation until removed from it",
        layouts=(ITEMS,),
        statements=("C3", "C4", "R2", "R8"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, tenant: str, item_id: str) -> Record[Item]:
        """The item of that id, wherever in the tenant it stands. Raises `Missing`."""
        page = await self._engine.scan(ITEMS, (tenant,), index="by_id", where=(item_id,), limit=1)
        if not page.items:
            raise NotFound("Item", item_id)
        return page.items[0]

    async def within(self, owner: Key, part: Part, item_id: str) -> Record[Item]:
        """The item of that id in one part of one owner. Raises `Missing`."""
        async for record in every(self._engine, ITEMS, owner[:1], index="by_id", where=(item_id,)):
            if record.key[:3] == (*owner, part):
                return record
        raise NotFound("Item", item_id)

    async def page(
        self,
        owner: Key,
        part: Part,
        query: ListQuery,
    ) -> Page[Record[Item]]:
        """Items of one part in the order they were added. Raises `WireError` for an `after` that is
        not among them."""
        last = None
        if query.after is not None:
            try:
                last = await self.within(owner, part, query.after)
            except Missing:
                raise no_such_after("item", query.after) from None
        wanted = Slice(query.limit, last, descending=query.order == "desc")
        return await page_of(self._engine, ITEMS, (*owner, part), wanted)

    async def all(self, owner: Key, *parts: Part) -> AsyncIterator[Record[Item]]:
        """Every item of some parts of `owner` (tenant and id), in order."""
        for part in parts:
            async for record in every(self._engine, ITEMS, (*owner, part)):
                yield record

    async def counted(self, part: Part, owners: Iterable[tuple[Key, int]]) -> list[Record[Item]]:
        """Every item of one part of some owners, each given with the number of its items: in order,
        and in few reads however many the owners are. Raises `Missing` for one that is gone."""
        keys = [_key(owner, part, at) for owner, count in owners for at in range(count)]
        items: list[Record[Item]] = []
        for start in range(0, len(keys), PAGE_MAX):
            wanted = keys[start : start + PAGE_MAX]
            for key, record in zip(wanted, await self._engine.get_many(ITEMS, wanted), strict=True):
                if record is None:
                    raise NotFound("Item", show(key))
                items.append(record)
        return items

    async def removal(self, owner: Key) -> Batch:
        """The batch that deletes every item a response owns."""
        return self.remove([item.key async for item in self.all(owner, "input", "output")])

    def add(self, owner: Key, part: Part, items: Sequence[NewItem], *, position: int = 0) -> Batch:
        """Write items at consecutive positions that the owner's record has set aside."""
        return join(
            put(
                ITEMS,
                _key(owner, part, at),
                Item(item.id, item.type),
                attachment=item.body,
                expect=0,
            )
            for at, item in enumerate(items, position)
        )

    def remove(self, keys: Sequence[Key]) -> Batch:
        """Delete items by the keys they were read under."""
        return join(delete(ITEMS, key) for key in keys)


def _key(owner: Key, part: Part, position: int) -> Key:
    return (*owner, part, f"{position:010d}")


def body(record: Record[Item]) -> bytes:
    """The wire JSON of an item read from the store. Raises `Damaged` where there is none."""
    if record.attachment is None:
        raise Damaged(f"item {record.value.id}", "its JSON is gone")
    return record.attachment
