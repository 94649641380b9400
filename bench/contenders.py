"""Where each contender runs: its own virtual environment with pinned packages, made on demand."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-bench"
PINS = ROOT / "bench" / "environments"

PERDURE = "Perdure"
PERDURE_SHARDS = "Perdure, shards"
PERDURE_FILES = "Perdure, files"
PERDURE_SQLITE = "Perdure, SQLite"
PERDURE_MEMORY = "Perdure, memory"
RAW = "raw SQLite"
RAW_APPEND = "one file, shared fsyncs"
LANGGRAPH = "LangGraph AsyncSqliteSaver"
LANGGRAPH_POSTGRES = "LangGraph AsyncPostgresSaver"
ASYNCPG = "asyncpg"
AGENTS = "OpenAI Agents SQLiteSession"
ADK = "Google ADK DatabaseSessionService"
EVENTSOURCING = "eventsourcing on SQLite"
FASTAPI = "FastAPI + uvicorn"
FASTAPI_DURABLE = "FastAPI + sqlite3 (durable)"
STARLETTE = "Starlette + msgspec + uvicorn"
STARLETTE_ASYNCPG = "Starlette + asyncpg (durable)"
STARLETTE_LANGGRAPH = "Starlette + AsyncPostgresSaver (durable)"

_ENVIRONMENT_OF = {
    LANGGRAPH: "langgraph",
    LANGGRAPH_POSTGRES: "langgraph-postgres",
    AGENTS: "agents",
    ADK: "adk",
    EVENTSOURCING: "eventsourcing",
    FASTAPI: "fastapi",
    FASTAPI_DURABLE: "fastapi",
    STARLETTE: "starlette",
    STARLETTE_ASYNCPG: "starlette-postgres",
    STARLETTE_LANGGRAPH: "starlette-postgres",
}


def python_of(contender: str) -> Path:
    """The interpreter of a contender, its environment made or renewed where the pins changed."""
    if contender not in _ENVIRONMENT_OF:
        return Path(sys.executable)
    name = _ENVIRONMENT_OF[contender]
    directory, pins = ENVIRONMENTS / name, PINS / f"{name}.txt"
    python, installed = directory / "bin" / "python", directory / "installed.txt"
    if not installed.exists() or installed.read_text() != pins.read_text():
        print(f"installing {name} ...", file=sys.stderr, flush=True)
        venv.create(directory, with_pip=True, clear=True)
        install(python, "-r", str(pins))
        installed.write_text(pins.read_text())
    return python


def install(python: Path, *what: str) -> None:
    """Install into an environment with its own pip."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *what], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"installing {' '.join(what)} failed:\n{done.stderr[-4000:]}")
