"""`perdure reshard`: spread what is partitioned over the shards that are configured."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from perdure import library
from perdure.core.engine import Resharded
from perdure.core.errors import Missing
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, say_json, shown_progress
from perdure.frontends.cli.store import holder, work
from perdure.services.backups import Progress
from perdure.services.config import Config


def reshard(
    drain: Annotated[
        list[str] | None,
        typer.Option(help="A shard to move everything away from, by id or URL; may be repeated."),
    ] = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Spread what is partitioned over all shards that are configured, while the server goes on."""
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        done = asyncio.run(_reshard(settings, drain or [], progress))
    if json:
        say_json(done)
    else:
        console.print(
            f"moved {done.partitions} partitions, {done.rows} rows, each verified; "
            f"the shards are {', '.join(done.shards)}",
            markup=False,
        )


async def _reshard(config: Config, drain: list[str], progress: Progress) -> Resharded:
    try:
        held = await holder(config)
    except Missing:  # a shard that is new: opening it for writing makes it
        held = None
    if held is not None:
        return await work(held, "/control/reshard", {"drain": drain}, Resharded, progress)
    return await library.reshard(config.engine_url, drain, progress)
