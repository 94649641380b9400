"""`perdure contract`: what every surface promises, and which tests prove it."""

from __future__ import annotations

import asyncio

from perdure.core.engine import Survives
from perdure.core.promises import check_promises
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, say_json, table
from perdure.frontends.cli.store import ask, holder
from perdure.library import open as open_store
from perdure.services.config import Config
from perdure.services.reports import StateReport, last_seen, state_report
from perdure.surfaces.state import PROMISES


def contract(
    data: Data = None, engine: Engine = None, config: ConfigFile = None, json: AsJson = False
) -> None:
    """List every surface: its class, what an acknowledgement means, what it survives."""
    settings = configured(config, data=data, engine=engine)
    report = asyncio.run(_contract(settings))
    if json:
        say_json(report)
        return
    for surface in report.surfaces:
        proofs = {proof for tests in surface.proofs.values() for proof in tests}
        console.print(f"[bold]{surface.surface}[/] {surface.durability}, version {surface.version}")
        rows = table()
        rows.add_row("  acknowledged", surface.acknowledgement)
        rows.add_row("  survives", _survives(surface.survives))
        rows.add_row("  owner", surface.owner)
        rows.add_row("  recovery", surface.recovery)
        rows.add_row("  retention", surface.retention)
        rows.add_row("  proven by", f"{len(proofs)} tests of {', '.join(surface.proofs)}")
        console.print(rows)
    console.print(f"kept in {report.engine}, profile {report.profile}")
    for warning in report.warnings:
        console.print(f"[yellow]warning[/] {warning}")


async def _contract(config: Config) -> StateReport:
    held = await holder(config)
    if held is not None:
        return await ask(held, "/v1/state", StateReport)
    async with open_store(config.engine_url, read_only=True) as state:
        warnings = check_promises(PROMISES, state.engine, "local")
        seen = await last_seen(state)
        warnings += [f"{one.where}: {one.why}" for one in seen.damaged]
        recovery = seen.boot.recovery if seen.boot is not None else ()
        return state_report(
            state.engine.url, config.profile, recovery, warnings, shards=state.sharding
        )


def _survives(survives: Survives) -> str:
    held = [
        name.replace("_", " ") for name in survives.__struct_fields__ if getattr(survives, name)
    ]
    return ", ".join(held) or "nothing"
