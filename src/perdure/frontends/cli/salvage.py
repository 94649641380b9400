"""`perdure salvage`: a new store of what is sound in a damaged one, and a list of what is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from perdure import library
from perdure.core.errors import Damaged
from perdure.core.values import Lost
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import EXITS, console, say_json, shown_progress

Into = Annotated[
    Path, typer.Option("--into", help="Directory of the new store. It must not exist yet.")
]


def salvage(
    into: Into,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Make a new store of what is sound in a damaged one, and list what is not.

    The damaged one is not changed. Exits with 0 when nothing is lost and with 6 when something is.
    """
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        made = asyncio.run(
            library.salvage(settings.engine_url, settings.blobs_url, into.absolute(), progress)
        )
    if json:
        say_json(made)
    else:
        for lost in made.lost:
            console.print(f"[red]lost[/] {_named(lost)}: {lost.why}")
        kept = ", ".join(f"{count} {name}" for name, count in made.kept.items() if count)
        console.print(f"salvaged into [bold]{into}[/]: {kept or 'nothing'}, verified")
        console.print("nothing is lost" if made.ok else f"{len(made.lost)} losses")
    if not made.ok:
        raise typer.Exit(EXITS[Damaged])


def _named(lost: Lost) -> str:
    """What is lost, as people name it."""
    entries = "" if lost.entries is None else " entries {} to {}".format(*lost.entries)
    return f"{lost.collection or 'store'}{f' {lost.key}' if lost.key else ''}{entries}"
