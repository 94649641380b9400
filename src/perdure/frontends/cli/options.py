"""Options that commands share, and the configuration they amount to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perdure.services.config import Config, load

Data = Annotated[
    str | None, typer.Option("--data", help="Directory of the store. [default: ./perdure-data]")
]
Engine = Annotated[
    str | None,
    typer.Option("--engine", help="Engine URL. [default: SQLite inside the data directory]"),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Configuration file. [default: ./perdure.toml]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def configured(file: Path | None, **flags: Any) -> Config:
    """The configuration in force; a flag's dots are written as double underscores."""
    return load(file=file, flags={name.replace("__", "."): flag for name, flag in flags.items()})
