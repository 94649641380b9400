"""`perdure verify`: walk everything stored and list what is not as it was written."""

from __future__ import annotations

import asyncio

import msgspec
import typer

from perdure.core.errors import Damaged
from perdure.core.values import Finding
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import EXITS, console, say_json
from perdure.frontends.cli.store import ask, holder
from perdure.library import open as open_store
from perdure.services.config import Config

_SHOWN = 1_000


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; `more` says that the list was cut off."""

    ok: bool
    findings: list[Finding]
    more: bool = False


def verify(
    data: Data = None, engine: Engine = None, config: ConfigFile = None, json: AsJson = False
) -> None:
    """List all damage. Exits with 0 when there is none and with 6 when there is."""
    settings = configured(config, data=data, engine=engine)
    found = asyncio.run(_verify(settings))
    if json:
        say_json(found)
    else:
        for finding in found.findings:
            console.print(f"[red]{finding.kind}[/] {finding.where}: {finding.why}")
        more = f"more than {_SHOWN}" if found.more else len(found.findings)
        console.print("nothing is damaged" if found.ok else f"{more} findings")
    if not found.ok:
        raise typer.Exit(EXITS[Damaged])


async def _verify(config: Config) -> Verified:
    held = await holder(config)
    if held is not None:
        return await ask(held, "/control/verify", Verified, timeout_s=None)
    findings: list[Finding] = []
    async with open_store(config.engine_url, read_only=True) as state:
        async for finding in state.engine.verify():
            if len(findings) == _SHOWN:
                return Verified(ok=False, findings=findings, more=True)
            findings.append(finding)
    return Verified(ok=not findings, findings=findings)
