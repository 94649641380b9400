"""Clients of a server that contend for one conversation and its request keys while the server is
killed: one history over several lives, in which every answer must be explained."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from perdure.proving.campaign import Stage
from perdure.proving.client import Answer, Client, Gone
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.launcher import Death, Plan
from perdure.proving.linear import linearizable
from perdure.proving.oracle import History
from perdure.proving.talk import Request, Talk
from perdure.proving.victim import Victim
from perdure.proving.waiting import TooLate

_LIVES = 3
_CLIENTS = 3
_TURNS = 14
_KEYS = 8
"""So many requests have a key, and are sent in any life by whoever draws them."""

_COMMITS = 50


class Contention:
    """One conversation, what everybody asked of it, and what they were told."""

    def __init__(self, place: Path) -> None:
        self.told: list[Request] = []
        self.answers: dict[str, set[bytes]] = defaultdict(set)
        """What the senders of each key were answered: one thing."""
        self.wrong: list[str] = []
        self.history = History(place / "history.jsonl")
        self._conversation = ""
        self._ids: dict[str, str] = {}
        self._now = 0

    async def begin(self, client: Client) -> None:
        """Make the conversation, unless an earlier life did. Raises `Gone`."""
        if not self._conversation:
            made = await client.send("POST", "/v1/conversations", {"metadata": {"says": ""}})
            self._conversation = f"/v1/conversations/{made.json()['id']}"

    async def take_turns(self, client: Client, life: int) -> None:
        """What one client does until the server is gone."""
        rng = client.rng
        with suppress(Gone):
            for turn in range(_TURNS):
                text = f"{life}-{client.worker}-{turn}"
                roll = rng.random()
                if roll < 0.3:
                    await self.ask(client, Request(verb="add", text=text))
                elif roll < 0.5:
                    key = f"key {rng.randrange(_KEYS)}"
                    await self.ask(client, Request(verb="add", text=key, key=key))
                elif roll < 0.68:
                    await self.ask(client, Request(verb="describe", text=text))
                elif roll < 0.75 and self._ids:
                    await self.ask(client, Request(verb="remove", text=rng.choice([*self._ids])))
                else:
                    await self.read(client)

    async def read(self, client: Client) -> None:
        """Read all of it, in two requests."""
        await self.ask(client, Request(verb="metadata"))
        await self.ask(client, Request(verb="items"))

    async def ask(self, client: Client, request: Request) -> None:
        """Send a request, and take down what came of it. Raises `Gone`."""
        self._now += 1
        request = replace(request, called=self._now)
        try:
            answer = await self._send(client, request)
        except Gone:
            if request.verb not in ("metadata", "items"):
                self._keep(request)
            raise
        self._now += 1
        self._keep(self._understood(replace(request, returned=self._now), answer))

    async def _send(self, client: Client, request: Request) -> Answer:
        items = f"{self._conversation}/items"
        match request.verb:
            case "describe":
                body: Any = {"metadata": {"says": request.text}}
                return await client.send("POST", self._conversation, body)
            case "add":
                body = {"items": [{"role": "user", "content": request.text}]}
                key = {"Idempotency-Key": request.key} if request.key else {}
                return await client.send("POST", items, body, key)
            case "remove":
                return await client.send("DELETE", f"{items}/{self._ids[request.text]}")
            case "metadata":
                return await client.get(self._conversation)
            case "items":
                return await client.get(f"{items}?order=asc&limit=100")

    def _understood(self, request: Request, answer: Answer) -> Request:
        if request.verb == "remove" and answer.status == 404:
            return replace(request, told="absent")
        if answer.status >= 500:  # the client complains of it
            return replace(request, returned=None)
        if answer.status != 200:
            self.wrong.append(f"{request} was answered {answer.status}: {answer.body[:300]!r}")
            return replace(request, returned=None)
        found: tuple[str, ...] = ()
        body = answer.json()
        match request.verb:
            case "metadata":
                found = (body["metadata"]["says"],)
            case "items":
                found = tuple(item["content"][0]["text"] for item in body["data"])
            case "add":
                self._ids[request.text] = body["data"][0]["id"]
                if request.key is not None:
                    self.answers[request.key].add(answer.body)
        return replace(request, told="done", found=found)

    def _keep(self, request: Request) -> None:
        self.told.append(request)
        self.history.mark("told", request=request)

    def _parts(self) -> dict[str, list[Request]]:
        """No request sees both parts of a conversation, so each has an order of its own. A write
        without an answer that no read shows may as well never have been made: the search is
        spared it."""
        shown = {text for one in self.told for text in one.found}
        told = [
            one
            for one in self.told
            if one.told != "unknown" or one.verb == "remove" or one.text in shown
        ]
        metadata = [one for one in told if one.verb in ("describe", "metadata")]
        return {"metadata": metadata, "items": [one for one in told if one not in metadata]}

    def judged(self) -> list[str]:
        """What does not hold of all that was told."""
        wrong = [
            f"no order of the {len(told)} requests for its {part} explains what was told"
            for part, told in self._parts().items()
            if not linearizable(told, Talk())
        ]
        wrong += [
            f"the requests with {key} were given {len(answers)} answers"
            for key, answers in self.answers.items()
            if len(answers) > 1
        ]
        return wrong + self.wrong + self.history.complaints


class ContendingRequests:
    """See `says`. `plant` is a bug for a proof."""

    fault = PROCESS_CRASH
    subject: Subject = "http"
    says = (
        "clients of a server describe, extend, shorten and read one conversation at once, some "
        "with the same request keys, while it is killed between its commits: what all of them "
        "were told over several lives has an order that explains it, and a key has one effect and "
        "one answer"
    )

    def __init__(self, plant: str | None = None) -> None:
        self._plant = plant

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async with Stage(trial.home) as stage:
            await trial.each(partial(self._judge, trial, stage))

    async def _judge(self, trial: Trial, stage: Stage, case: int, place: Path) -> list[str]:
        contention = Contention(place)
        try:
            for life in range(1, _LIVES + 1):
                rng = trial.rng("contend", case, life)
                await self._live(stage, place, contention, rng, life)
            await self._live(stage, place, contention, trial.rng("read", case), 0)
        except (Gone, TooLate) as error:
            contention.wrong.append(str(error))
        finally:
            contention.history.close()
        trial.count("requests", len(contention.told))
        trial.count("unknown", sum(request.told == "unknown" for request in contention.told))
        return contention.judged()

    async def _live(
        self, stage: Stage, place: Path, contention: Contention, rng: random.Random, life: int
    ) -> None:
        """One server, killed in the midst of it; the last one, 0, is read, and takes one more."""
        death = Death(rng.choice(("before", "after")), rng.randint(5, _COMMITS)) if life else None
        victim = await stage.nursery.start(
            Plan(
                data=str(place / "data"),
                port=stage.port,
                upstream=stage.upstream.url,
                death=death,
                plant=self._plant,
            )
        )
        await victim.ready()
        clients = [
            Client(victim.url, contention.history, who, random.Random(rng.random()))
            for who in range(_CLIENTS)
        ]
        try:
            await _use(contention, clients, life)
        finally:
            for client in clients:
                await client.close()
            await _dead(victim)


async def _use(contention: Contention, clients: list[Client], life: int) -> None:
    first = clients[0]
    if life:
        with suppress(Gone):
            await contention.begin(first)
            await asyncio.gather(*(contention.take_turns(client, life) for client in clients))
        return
    await contention.begin(first)
    await contention.read(first)
    await contention.ask(first, Request(verb="add", text="last"))
    await contention.read(first)


async def _dead(victim: Victim) -> None:
    victim.signal()
    await victim.death()
