"""`perdure prune`: remove what is older than it is to be kept, or say what that would be."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from perdure.core.clock import SystemClock
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, moment, say_json, shown_progress
from perdure.frontends.cli.store import holder, work
from perdure.library import open as open_store
from perdure.services.config import Config
from perdure.services.retention import Progress, Pruned, Retention


def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    days: Annotated[
        float | None,
        typer.Option(help="Age in days. [default: retention.responses_days]", min=0.0001),
    ] = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Remove old responses, but none that a later one continues or that still runs."""
    settings = configured(config, data=data, engine=engine)
    with shown_progress() as progress:
        pruned = asyncio.run(_prune(settings, days, progress, dry_run=dry_run))
    if json:
        say_json(pruned)
        return
    if dry_run:
        for one in pruned.ids:
            console.print(one, markup=False)
        if pruned.responses > len(pruned.ids):
            console.print(f"and {pruned.responses - len(pruned.ids)} more")
    for finding in pruned.damaged:
        console.print(f"{finding.kind} {finding.where}: {finding.why}", markup=False)
    console.print(
        f"{pruned.responses} responses from before {moment(pruned.created_before_s)} UTC "
        f"{'would be' if dry_run else 'were'} removed; {pruned.needed} as old stay because a later "
        f"one continues them, {pruned.running} because they have not ended"
    )


async def _prune(
    config: Config, days: float | None, progress: Progress, *, dry_run: bool
) -> Pruned:
    held = await holder(config)
    if held is not None:
        asked = {"days": days, "dry_run": dry_run}
        return await work(held, "/control/prune", asked, Pruned, progress)
    async with open_store(config.engine_url) as state:
        retention = Retention(state, SystemClock(), config.retention.responses_days)
        return await retention.prune(days, progress, dry_run=dry_run)
