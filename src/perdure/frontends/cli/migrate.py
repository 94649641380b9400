"""`perdure migrate`: an older store, brought to the format of this release."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.filesize import decimal

from perdure import library
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, say_json, shown_progress, table

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def migrate(
    dry_run: DryRun = False,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Upgrade a store that an older Perdure wrote, after a verified snapshot of it, which is kept.

    A server does the same when it starts. No process may use a local store meanwhile.
    """
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        found = asyncio.run(
            library.migrate(
                *(settings.engine_url, settings.blobs_url, settings.data_path, progress),
                dry_run=dry_run,
            )
        )
    if json:
        say_json(found)
        return
    if not found.steps:
        console.print(f"{found.engine} is in format {found.format}: nothing is to be done.")
        return
    console.print(f"{found.engine} is in format {found.format}; this release writes {found.newest}")
    listed = table()
    for step in found.steps:
        listed.add_row(step.says, f"{step.rows:,} rows", f"at most {decimal(step.size_bytes)}")
    listed.add_row("snapshot", found.snapshot, decimal(found.snapshot_size_bytes))
    console.print(listed)
    if found.done:
        console.print("upgraded, everything verified; the snapshot is kept, remove it at will")
    else:
        room = f"{decimal(found.needed_size_bytes)} of {decimal(found.free_size_bytes)} free"
        console.print(f"needs {room}; nothing was changed")
