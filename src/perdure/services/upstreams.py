"""Upstreams: which of the model servers answers to a model's name.

A name is looked for as an alias, as `upstream/model`, in what the configuration says is asked of
an upstream, and last in what the upstreams list. One that falls silent hides nothing of the others,
and its own models still lead to it: whoever asks for them learns what is wrong with it, unless
another serves the same model. Then that is asked in its place, as long as nothing was said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import msgspec
import structlog

from perdure.services.continuing import Continues
from perdure.services.startup import Check
from perdure.services.upstream import Upstream, UpstreamFailed
from perdure.wire.errors import WireError

C = TypeVar("C")
T = TypeVar("T")

_log = structlog.get_logger("perdure.upstreams")

_UNASKED = "not asked yet"

_NAMED_MAX = 20
"""Models that a message names."""


class Member(msgspec.Struct, frozen=True):
    """An upstream and what it is asked for: `models` are names or patterns, all it lists if none;
    `aliases` lead to its models; without a `required` one that answers the node is not ready."""

    name: str
    upstream: Upstream
    models: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    required: bool = False
    continues: Continues = "no"

    def serves(self, model: str) -> bool:
        """Whether the configuration lets it be asked for a model."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def offers(self) -> list[str]:
        """Its models as far as they are known, and its aliases."""
        return [*self.aliases, *filter(self.serves, self.upstream.listed)]


class Target(msgspec.Struct, frozen=True):
    """Whom to ask, and by what name the model goes there. `continues`: how a message of it is gone
    on with."""

    upstream: Upstream
    model: str
    continues: Continues = "no"


async def first_that_answers(choices: Sequence[C], ask: Callable[[C], Awaitable[T]]) -> T:
    """What the first one says that can be reached. Who was reached is the one, whatever it says;
    of those in its place, one that does not take the request is passed over. Raises the failure of
    the first."""
    failed: UpstreamFailed | None = None
    for choice in choices:
        try:
            return await ask(choice)
        except UpstreamFailed as failure:
            if not failure.unreached:
                raise
            failed = failed or failure
            _log.warning("an upstream is away", answered=failure.answered, error=failure.code)
        except WireError:
            if failed is None:
                raise
    assert failed is not None, "there was nobody to ask"
    raise failed


class Offered(msgspec.Struct, frozen=True):
    """A name that can be asked for, and the upstream that answers to it."""

    id: str
    owned_by: str


class Upstreams:
    """Every upstream, in the order in which they are looked through. False where there is none."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._trouble: dict[str, str | None] = {member.name: _UNASKED for member in members}

    def __len__(self) -> int:
        return len(self.members)

    async def resolve(self, model: str) -> list[Target]:
        """Who answers to a name, in the order in which they are to be asked; see
        `first_that_answers`. Raises `WireError` naming what there is, `UpstreamFailed` where an
        upstream that does not answer might know it, and `CircuitOpen` where all are left alone."""
        found = self._find(model)
        if not found or (len(self.members) > 1 and _UNASKED in self._trouble.values()):
            await self.probe()
            found = self._find(model)
        if found:
            resting = [member.upstream.resting() for member, _ in found]
            if all(resting) and resting[0] is not None:
                raise resting[0]
            awake = [one for one, rests in zip(found, resting, strict=True) if rests is None]
            return [Target(it.upstream, name, it.continues) for it, name in awake]
        for member in self.members:
            trouble = self._trouble[member.name]
            if trouble is not None and not member.models and not member.upstream.listed:
                raise UpstreamFailed(
                    f"The model '{model}' is at none of the upstreams that answer, and "
                    f"'{member.name}' does not: {trouble}"
                )
        names = [offered.id for offered in self._offered()]
        there = ", ".join(names[:_NAMED_MAX]) or "none"
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        asked = [f"{it.name}: {', '.join(it.models)}" for it in self.members if it.models]
        patterns = f" Asked for by configuration are: {'; '.join(asked)}." if asked else ""
        raise WireError(
            f"The model '{model}' does not exist here. There are: {there}{more}.{patterns} "
            "See /v1/models.",
            param="model",
            code="model_not_found",
        )

    def may_continue(self, model: str) -> bool:
        """Whether a message of a model can be gone on with, as far as it is known who answers to
        it: after a start of the whole machine nobody may have listed anything yet."""
        found = self._find(model)
        members = [member for member, _ in found] or self.members
        return any(member.continues != "no" for member in members)

    async def models(self) -> list[Offered]:
        """What can be asked for. Raises `UpstreamFailed` where no upstream has ever answered."""
        await self.probe()
        offered = self._offered()
        troubles = [trouble for trouble in self._trouble.values() if trouble is not None]
        if not offered and troubles:
            raise UpstreamFailed(troubles[0])
        return offered

    async def probe(self) -> None:
        """Learn which upstreams answer, and what they list. Trouble is a reason, never raised."""
        await asyncio.gather(*(self._ask(member) for member in self.members))

    def checks(self) -> Iterator[Check]:
        """The condition of readiness that each upstream is."""
        if not self.members:
            yield Check("upstream", True, "none; the built-in model perdure-extract answers")
        for member in self.members:
            resting = member.upstream.resting()
            trouble = str(resting) if resting is not None else self._trouble[member.name]
            name = "upstream" if len(self.members) == 1 else f"upstream {member.name}"
            ok = trouble is None or not member.required
            yield Check(name, ok, trouble or member.upstream.url)

    async def close(self) -> None:
        """Close every upstream's connections."""
        for member in self.members:
            await member.upstream.close()

    def _find(self, model: str) -> list[tuple[Member, str]]:
        """Where a name leads as far as is known, and what it is there: first whom it is for, then
        who has the same model. Aliases and long names are one upstream's own. An only upstream is
        asked for anything: it knows best which models it has, and says so."""
        for member in self.members:
            if model in member.aliases:
                return [(member, member.aliases[model])]
        name, _, rest = model.partition("/")
        for member in self.members:
            if member.name == name and rest and (rest in member.aliases or member.serves(rest)):
                return [(member, member.aliases.get(rest, rest))]
        serving = [member for member in self.members if member.serves(model)]
        asked = [member for member in serving if member.models or len(self.members) == 1]
        listing = [member for member in serving if model in member.upstream.listed]
        unheard = [member for member in asked if not member.upstream.listed]
        found = dict.fromkeys(it.name for it in (*asked[:1], *listing, *unheard))
        return [(it, model) for name in found for it in self.members if it.name == name]

    def _offered(self) -> list[Offered]:
        """Every name once, with the upstream it leads to: a model that another upstream is asked
        for stands under its long name."""
        names: dict[str, Offered] = {}
        for member in self.members:
            for id in member.offers():
                found = self._find(id)
                name = id if found and found[0][0] is member else f"{member.name}/{id}"
                names[name] = Offered(name, member.name)
        return list(names.values())

    async def _ask(self, member: Member) -> None:
        try:
            await member.upstream.models()
            self._trouble[member.name] = None
        except UpstreamFailed as error:
            self._trouble[member.name] = str(error)
