"""`perdure backup` and `perdure restore`: everything to another place, and back from there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from perdure import library
from perdure.core.errors import Invalid
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, moment, say_json, shown_progress
from perdure.frontends.cli.store import holder, work
from perdure.services.backups import Manifest, Progress
from perdure.services.config import Config


def backup(
    target: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Copy everything, as it is at one moment, while the server goes on; the copy is verified."""
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        manifest = asyncio.run(_back_up(settings, target.absolute(), progress))
    if json:
        say_json(manifest)
    else:
        console.print(f"backed up to [bold]{target}[/]: {_described(manifest)}")


def restore(
    source: Annotated[Path, typer.Argument(help="A directory that `perdure backup` made.")],
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Make a store of a backup, in a data directory that is empty or does not exist yet."""
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        manifest = asyncio.run(_restore(settings, source.absolute(), progress))
    if json:
        say_json(manifest)
    else:
        console.print(f"restored into [bold]{settings.data}[/]: {_described(manifest)}")


async def _back_up(config: Config, target: Path, progress: Progress) -> Manifest:
    held = await holder(config)
    if held is not None:
        return await work(held, "/control/backup", {"target": str(target)}, Manifest, progress)
    return await library.back_up(config.engine_url, config.blobs_url, target, progress)


async def _restore(config: Config, source: Path, progress: Progress) -> Manifest:
    if config.data_path.exists() and any(
        path for path in config.data_path.iterdir() if path.suffix != ".lock"
    ):
        raise Invalid(
            f"{config.data_path} is not empty. Name a directory that is, or does not exist, "
            "with --data; move what is there out of the way if it is to be replaced."
        )
    return await library.restore(config.engine_url, config.blobs_url, source, progress)


def _described(manifest: Manifest) -> str:
    return (
        f"{decimal(manifest.size_bytes)}, {manifest.blobs.count} blobs, commit "
        f"{manifest.snapshot.number} of {moment(manifest.taken_at_s)} UTC, verified"
    )
