"""Google ADK's `DatabaseSessionService` on SQLite: `append_event`, an event a call and a session a
writer, and `get_session` with its newest 20 events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from google.adk.events import Event
from google.adk.sessions import DatabaseSessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types

from bench.load import DOCUMENT, SESSION_ITEMS, SESSION_LAST, closed_loop, main

TEXT = str(DOCUMENT["text"])
NEWEST = GetSessionConfig(num_recent_events=SESSION_LAST)
Measure = Callable[[DatabaseSessionService], Awaitable[dict[str, float]]]


def run(directory: Path, measure: Measure) -> dict[str, float]:
    async def within() -> dict[str, float]:
        service = DatabaseSessionService(f"sqlite+aiosqlite:///{directory / 'adk.db'}")
        try:
            return await measure(service)
        finally:
            await service.close()

    return asyncio.run(within())


async def created(service: DatabaseSessionService, name: str) -> Session:
    return await service.create_session(app_name="bench", user_id="user", session_id=name)


async def append_one(service: DatabaseSessionService, session: Session) -> None:
    content = types.Content(role="user", parts=[types.Part(text=TEXT)])
    await service.append_event(session, Event(author="user", content=content))


def append(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(service: DatabaseSessionService) -> dict[str, float]:
        sessions = [await created(service, f"session-{writer}") for writer in range(writers)]
        return await closed_loop(
            lambda writer, n: append_one(service, sessions[writer]), writers, duration_s
        )

    return run(directory, measure)


def read(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(service: DatabaseSessionService) -> dict[str, float]:
        session = await created(service, "session")
        for _ in range(SESSION_ITEMS):
            await append_one(service, session)

        async def one(_writer: int, _n: int) -> None:
            found = await service.get_session(
                app_name="bench", user_id="user", session_id="session", config=NEWEST
            )
            assert found is not None
            assert len(found.events) == SESSION_LAST

        return await closed_loop(one, writers, duration_s)

    return run(directory, measure)


if __name__ == "__main__":
    main({"append": append, "read": read})
