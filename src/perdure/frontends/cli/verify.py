"""`perdure verify`: walk everything stored and list what is not as it was written."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer
from rich.filesize import decimal
from rich.markup import escape

from perdure import library
from perdure.core.errors import Damaged
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import EXITS, console, say_json
from perdure.frontends.cli.store import ask, holder
from perdure.services.config import Config
from perdure.services.verification import FINDINGS_MAX, Verified


def verify(
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    accept: Annotated[
        bool,
        typer.Option(
            help="Of a stopped file:/// store, first take what was changed by hand in its files "
            "for what is stored."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """List all damage: rows, the bytes of files, and rows that name bytes which are gone.

    Exits with 0 when there is none and with 6 when there is.
    """
    settings = configured(config, data=data, engine=engine)
    accepted = asyncio.run(library.accept(settings.engine_url)) if accept else []
    found = asyncio.run(_verify(settings))
    tell(msgspec.structs.replace(found, accepted=accepted), json)


def tell(found: Verified, json: bool) -> None:
    """Say what was found, and exit as that is."""
    if json:
        say_json(found)
    else:
        for one in found.accepted:
            console.print(f"[yellow]{one.kind}[/] {escape(one.where)}: {escape(one.why)}")
        for finding in found.findings:
            console.print(f"[red]{finding.kind}[/] {escape(finding.where)}: {escape(finding.why)}")
        more = f"more than {FINDINGS_MAX}" if found.more else len(found.findings)
        console.print("nothing is damaged" if found.ok else f"{more} findings")
        for stray in found.strays:
            console.print(f"[yellow]{stray.kind}[/] {escape(stray.where)}: {escape(stray.why)}")
        left = found.reclaimable
        if left.blobs or left.leftovers:
            console.print(
                f"{left.blobs} blobs ({decimal(left.size_bytes)}) that no record names and "
                f"{left.leftovers} unfinished ones; a running server sweeps them away"
            )
    if not found.ok:
        raise typer.Exit(EXITS[Damaged])


async def _verify(config: Config) -> Verified:
    held = await holder(config)
    if held is not None:
        return await ask(held, "/control/verify", Verified, timeout_s=None)
    return await library.verify(config.engine_url, config.blobs_url)
