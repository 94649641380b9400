"""Two engines, one sequence of operations, the same answers and the same errors.

`machine(one, other)` makes a hypothesis state machine; run it with `run_state_machine_as_test` or
as `machine(...).TestCase`. Needs hypothesis installed. The first subject is the reference; every
engine that survives its process is closed and opened again along the way. Engines run under
`Checked`, so each answer is also held to the rules by itself.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from perdure.core.batch import Batch, append, check, delete, drop, put, trim
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Invalid, LimitExceeded, PerdureError, Trimmed
from perdure.core.keys import Key
from perdure.core.layouts import Column, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Committed, Page
from perdure.engines.checked import Broken, Checked
from perdure.proving import hostile
from perdure.proving.subject import EVENTS, FACTS, MOVES, NOTES, PLIES, Note, Store, Subject, stored

CURRENT = -1
"""Stands for the version or number that is there now."""


def _one_of(named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """One of some named things, drawn by its name, for the things themselves do not print."""
    return st.sampled_from(list(named)).map(lambda name: named[name])


tenants = st.sampled_from(["t", "t", "t", "t", "u", "t "])
names = st.one_of(
    st.sampled_from(["1", "2", "3"]),
    _one_of(hostile.LEGAL_NAMES),
)
hostile_names = _one_of(hostile.REFUSED_NAMES)
boxes = st.sampled_from(["box", "bo", "b\u00f6x"])
statuses = st.sampled_from([None, "", "open", "1", "01", "\U0001f600", "cafe\u0301", "caf\u00e9"])
ranks = st.sampled_from([0, 1, 2, -1, 2**63 - 1, -(2**63)])
bodies = st.one_of(st.none(), _one_of(hostile.LEGAL_VALUES))
notes = st.builds(
    Note,
    status=st.one_of(statuses, st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
    rank=st.one_of(ranks, st.integers(-(2**63), 2**63 - 1)),
    due_s=st.one_of(st.none(), ranks),
    body=bodies,
)
filled = st.builds(Note, statuses, ranks, st.one_of(st.none(), ranks))
expectations = st.sampled_from([None, None, CURRENT, CURRENT, 0, 1, 2, 3])
attachments = st.one_of(st.none(), st.binary(max_size=20))
limits = st.sampled_from([2, 1, 2, 3, 2, 7, PAGE_MAX, 1, 3, 0, 0, PAGE_MAX + 1, -1])
operation_ids = st.one_of(st.none(), st.none(), st.sampled_from(["op", "op2", "op3", "op4"]))

places: st.SearchStrategy[tuple[Records[Note], Key]] = st.one_of(
    st.tuples(st.just(FACTS), st.tuples(tenants, names)),
    st.tuples(st.just(NOTES), st.tuples(tenants, boxes, names)),
    st.tuples(st.just(MOVES), st.tuples(tenants, st.sampled_from(["g1", "g2"]), names)),
)
streams = st.one_of(
    st.tuples(st.just(EVENTS), st.tuples(tenants, st.sampled_from(["1", "2"]))),
    st.tuples(st.just(PLIES), st.tuples(tenants, st.sampled_from(["g1", "g2"]))),
)
questions: st.SearchStrategy[tuple[Records[Note], Key, str | None, tuple[Column, ...]]] = st.one_of(
    st.tuples(
        st.sampled_from([NOTES, FACTS, MOVES]),
        st.one_of(st.just(()), st.tuples(tenants), st.tuples(tenants, boxes)),
        st.none(),
        st.just(()),
    ),
    st.tuples(  # which most often is no question at all
        st.just(NOTES),
        st.one_of(st.tuples(tenants), st.just(())),
        st.sampled_from(["by_status", "by_rank", "due"]),
        st.one_of(st.tuples(statuses), st.tuples(ranks), st.tuples(st.just(2**63))),
    ),
)
of_an_index: st.SearchStrategy[tuple[Records[Note], Key, str, tuple[Column, ...]]] = st.one_of(
    st.tuples(
        st.just(NOTES),
        st.tuples(tenants),
        st.just("by_status"),
        st.one_of(st.just(()), st.tuples(statuses), st.tuples(statuses, ranks)),
    ),
    st.tuples(
        st.just(NOTES),
        st.tuples(tenants),
        st.just("by_rank"),
        st.one_of(st.just(()), st.tuples(ranks)),
    ),
    st.tuples(
        st.just(NOTES), st.just(()), st.just("due"), st.one_of(st.just(()), st.tuples(ranks))
    ),
)


_FILLED = 9
"""Records and entries that are there before the first rule."""


class Step(msgspec.Struct, frozen=True):
    """One operation, before its expectation is filled in."""

    verb: str
    place: Any
    note: Note | None = None
    number: int | None = None
    count: int = 1
    attachment: bytes | None = None


steps = st.one_of(
    st.builds(
        Step,
        st.just("put"),
        places,
        note=notes,
        number=expectations,
        attachment=attachments,
    ),
    st.builds(Step, st.just("put"), places, note=notes, number=st.none()),
    st.builds(Step, st.just("delete"), places, number=expectations),
    st.builds(Step, st.just("check"), places, number=st.sampled_from([CURRENT, 0, 1])),
    st.builds(
        Step,
        st.just("append"),
        streams,
        note=notes,
        number=st.sampled_from([None, None, CURRENT, 0, 3]),
        count=st.integers(1, 4),
    ),
    st.builds(Step, st.just("trim"), streams, number=st.sampled_from([0, 1, 2, 5, CURRENT, 10**9])),
    st.builds(Step, st.just("drop"), streams),
)


class Cursors(msgspec.Struct, frozen=True):
    """A question asked of both engines, and the cursor each of them gave."""

    ask: Callable[[Engine, str | None], Awaitable[Page[Any]]]
    given: tuple[str | None, ...]


class Differential(RuleBasedStateMachine):
    """See the head of this file; `machine` binds the subjects."""

    subjects: tuple[Subject, ...]
    asked = Bundle("asked")
    sent = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="perdure-differential-"))
        self.stores = [
            Store(subject, self.directory / f"{at}") for at, subject in enumerate(self.subjects)
        ]
        for store in self.stores:
            store.directory.mkdir()
        self.engines: list[Checked] = [self.runner.run(store.open()) for store in self.stores]

    def teardown(self) -> None:
        try:
            self._agree(stored)
            for store in self.stores:
                self.runner.run(store.close())
        finally:
            self.runner.close()
            shutil.rmtree(self.directory)

    @initialize(entries=st.lists(filled, min_size=_FILLED, max_size=_FILLED))
    def fill(self, entries: list[Note]) -> None:
        """So much is there from the beginning that most questions are about something."""
        notes, moves = Batch(), Batch()
        for at, note in enumerate(entries):
            notes += put(NOTES, ("t", "box" if at % 3 else "bo", f"{at}"), note)
            notes += put(FACTS, ("t", f"{at}"), note)
            moves += put(MOVES, ("t", "g1", f"{at}"), note)
        for name in ("1", "2"):
            notes += append(EVENTS, ("t", name), entries)
        moves += append(PLIES, ("t", "g1"), entries)
        for batch in (notes, moves):
            self._agree(lambda engine, batch=batch: engine.commit(batch))  # type: ignore[misc]

    @rule(target=sent, parts=st.lists(steps, min_size=1, max_size=4), name=operation_ids)
    def commit(self, parts: list[Step], name: str | None) -> Any:
        batch = self._build(parts)
        if name is not None:
            batch = batch.named(name)
        self._agree(lambda engine: engine.commit(batch))
        return batch

    @rule(batch=sent)
    def commit_again(self, batch: Batch) -> None:
        self._agree(lambda engine: engine.commit(batch))

    @rule(
        several=st.lists(
            st.tuples(st.lists(steps, min_size=1, max_size=3), operation_ids),
            min_size=2,
            max_size=5,
        )
    )
    def commit_at_once(self, several: list[tuple[list[Step], str | None]]) -> None:
        """Both engines decide batches of one loop in the order in which they were handed over."""
        batches = [
            batch if name is None else batch.named(name)
            for batch, name in ((self._build(parts), name) for parts, name in several)
        ]

        async def together(engine: Engine) -> list[Any]:
            answers = await asyncio.gather(
                *(engine.commit(batch) for batch in batches), return_exceptions=True
            )
            return [_comparable(answer) for answer in answers]

        self._agree(together)

    @rule(place=places, name=hostile_names)
    def use_a_hostile_name(self, place: tuple[Records[Note], Key], name: str) -> None:
        records, key = place
        spoiled = (*key[:-1], name)
        self._agree(lambda engine: engine.get(records, spoiled), Invalid)
        self._agree(lambda engine: engine.scan(records, spoiled, limit=1), Invalid)
        self._agree(lambda engine: engine.tip(EVENTS, ("t", name)), Invalid)
        _refused(lambda: put(records, spoiled, Note()))
        _refused(lambda: put(FACTS, ("t", "1"), Note()).named(name))

    @rule(name=st.sampled_from(list(hostile.REFUSED_VALUES)))
    def write_a_hostile_value(self, name: str) -> None:
        hidden = Note(body={"a": [hostile.REFUSED_VALUES[name]]})
        _refused(lambda: put(FACTS, ("t", "1"), hidden))
        _refused(lambda: append(EVENTS, ("t", "1"), [Note(), hidden]))

    @rule(
        note=st.sampled_from([Note("a\0b"), Note("\ud800"), Note(rank=2**63), Note(due_s=-(2**70))])
    )
    def index_a_hostile_value(self, note: Note) -> None:
        _refused(lambda: put(NOTES, ("t", "box", "1"), note))

    @rule(place=places)
    def get(self, place: tuple[Records[Note], Key]) -> None:
        records, key = place
        self._agree(lambda engine: engine.get(records, key))

    @rule(found=st.lists(places, max_size=5))
    def get_many(self, found: list[tuple[Records[Note], Key]]) -> None:
        keys = [key for records, key in found if records is NOTES]
        self._agree(lambda engine: engine.get_many(NOTES, keys))

    @rule(target=asked, question=questions, limit=limits, descending=st.booleans())
    def scan(self, question: Any, limit: int, descending: bool) -> Any:
        return self._page(self._scan(question, limit, descending))

    @rule(
        target=asked,
        question=of_an_index,
        limit=limits,
        descending=st.booleans(),
        further=st.sampled_from([3, 1, 0]),
    )
    def scan_an_index(self, question: Any, limit: int, descending: bool, further: int) -> Any:
        asked = self._page(self._scan(question, limit, descending))
        for _ in range(further):
            if isinstance(asked, Cursors):
                asked = self._page(asked)
        return asked

    @rule(target=asked, log=st.sampled_from([EVENTS, PLIES]), prefix=tenants, limit=limits)
    def list_streams(self, log: Any, prefix: str, limit: int) -> Any:
        def ask(engine: Engine, cursor: str | None) -> Awaitable[Page[Any]]:
            return engine.streams(log, (prefix,), limit=limit, cursor=cursor)

        return self._page(Cursors(ask, (None,) * len(self.engines)))

    @rule(target=asked, cursors=consumes(asked))
    def next_page(self, cursors: Cursors) -> Any:
        return self._page(cursors)

    @rule(one=asked, other=asked)
    def use_the_cursor_of_another_question(self, one: Cursors, other: Cursors) -> None:
        self._page(Cursors(one.ask, other.given))

    @rule(
        question=questions,
        group=st.integers(-1, 3),
    )
    def count(
        self, question: tuple[Records[Note], Key, str | None, tuple[Column, ...]], group: int
    ) -> None:
        records, prefix, index, _ = question
        self._agree(lambda engine: engine.count(records, prefix, index=index, group=group))

    @rule(
        stream=streams,
        after=st.sampled_from([0, 1, 2, 5, -1, 10**9, 2**63]),
        incarnation=st.sampled_from([None, None, 1, 2, 3]),
        limit=limits,
    )
    def read(self, stream: Any, after: int, incarnation: int | None, limit: int) -> None:
        log, key = stream
        self._agree(
            lambda engine: engine.read(log, key, after=after, incarnation=incarnation, limit=limit)
        )
        self._agree(lambda engine: engine.tip(log, key))
        self._agree(lambda engine: engine.wait(log, key, after, timeout_s=0))

    @rule()
    def reopen(self) -> None:
        for at, store in enumerate(self.stores):
            if self.engines[at].survives.process_crash:
                self.engines[at] = self.runner.run(store.reopen(self.engines[at]))
        self._agree(stored)

    def _build(self, parts: list[Step]) -> Batch:
        return self.runner.run(_batch(parts, self.engines[0]))

    def _scan(
        self,
        question: tuple[Records[Note], Key, str | None, tuple[Column, ...]],
        limit: int,
        descending: bool,
    ) -> Cursors:
        records, prefix, index, where = question

        def ask(engine: Engine, cursor: str | None) -> Awaitable[Page[Any]]:
            return engine.scan(
                records,
                prefix,
                index=index,
                where=where,
                limit=limit,
                cursor=cursor,
                descending=descending,
            )

        return Cursors(ask, (None,) * len(self.engines))

    def _page(self, cursors: Cursors) -> Any:
        """Ask both for a page; where both have more, both cursors go on together."""
        given = iter(cursors.given)
        pages = self._agree(lambda engine: cursors.ask(engine, next(given)))
        if not all(isinstance(page, Page) and page.cursor for page in pages):
            return multiple()
        return Cursors(cursors.ask, tuple(page.cursor for page in pages))

    def _agree(
        self, ask: Callable[[Engine], Awaitable[Any]], kind: type[PerdureError] | None = None
    ) -> list[Any]:
        """Ask every engine; the answers, or the errors, must be the same."""
        answers = [self.runner.run(_answer(ask, engine)) for engine in self.engines]
        compared = [_comparable(answer) for answer in answers]
        for engine, found in zip(self.engines, compared, strict=True):
            if found != compared[0]:
                raise Broken(
                    f"{self.engines[0].url} answers {compared[0]}; {engine.url} answers {found}"
                )
        if kind is not None and not isinstance(answers[0], kind):
            raise Broken(f"expected {kind.__name__}, found {answers[0]!r}")
        return answers


def machine(one: Subject, other: Subject) -> type[Differential]:
    """The state machine that compares two engines."""
    return type(f"{one.name}_and_{other.name}", (Differential,), {"subjects": (one, other)})


async def _batch(parts: list[Step], engine: Engine) -> Batch:
    """The batch of some steps, with what is there now filled in for `CURRENT`."""
    batch = Batch()
    for step in parts:
        layout, key = step.place
        number = step.number
        if number == CURRENT:
            if isinstance(layout, Records):
                record = await engine.get(layout, key)
                number = 0 if record is None else record.version
            else:
                number = (await engine.tip(layout, key)).last
        match step.verb:
            case "put":
                batch += put(layout, key, step.note, expect=number, attachment=step.attachment)
            case "delete":
                batch += delete(layout, key, expect=number)
            case "check":
                batch += check(layout, key, number or 0)
            case "append":
                batch += append(layout, key, [step.note] * step.count, after=number)
            case "trim":
                batch += trim(layout, key, number or 0)
            case _:
                batch += drop(layout, key)
    return batch


async def _answer(ask: Callable[[Engine], Awaitable[Any]], engine: Engine) -> Any:
    try:
        return await ask(engine)
    except PerdureError as error:
        return error


def _comparable(answer: Any) -> Any:
    """What must be equal: everything but cursors, which are each store's own, and messages."""
    match answer:
        case Conflict():
            return (Conflict, answer.code, answer.where, answer.expected, answer.actual)
        case LimitExceeded():
            return (LimitExceeded, answer.code, answer.what, answer.actual, answer.limit)
        case Trimmed():
            return (Trimmed, answer.code, answer.first_kept)
        case PerdureError():
            return (type(answer), answer.code)
        case BaseException():
            raise answer
        case Page():
            return (repr(answer.items), answer.cursor is None, answer.missing)
        case Committed():
            return answer
    return repr(answer) if not isinstance(answer, dict) else answer


def _refused(build: Callable[[], Batch]) -> None:
    """What no engine may see is refused while the batch is built."""
    try:
        build()
    except Invalid:
        return
    raise Broken("a hostile name or value became part of a batch")
