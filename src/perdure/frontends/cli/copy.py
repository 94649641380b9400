"""`perdure copy`: a whole store to another place, on another engine."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.filesize import decimal

from perdure import library
from perdure.core.addresses import without_credentials
from perdure.core.errors import Invalid
from perdure.frontends.cli.options import AsJson, ConfigFile, configured
from perdure.frontends.cli.output import console, say_json, shown_progress, table

Blobs = Annotated[
    str | None,
    typer.Option(
        "--blobs",
        help="Where the source keeps the bytes of files. [default: beside a SQLite store, else "
        "where the configuration says]",
    ),
]
BlobsTo = Annotated[
    str | None,
    typer.Option(
        "--blobs-to",
        help="Where the copy keeps them. [default: beside a SQLite store, else where they are]",
    ),
]


def copy(
    source: Annotated[str, typer.Argument(help="URL of the store, which no process may use.")],
    target: Annotated[str, typer.Argument(help="URL of the copy: an empty place.")],
    blobs: Blobs = None,
    blobs_to: BlobsTo = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Move a whole store to another engine or place; both sides are compared by digest.

    The copy can be used only when it is complete. One that was cut off is completed by the same
    command.
    """
    for url in (source, target):
        if url.startswith("memory:"):
            raise Invalid("memory:// ends with its process, so it is neither copied nor a copy.")
    read_at = blobs or library.blobs_beside(source) or configured(config).blobs_url
    kept_at = blobs_to or library.blobs_beside(target) or read_at
    with shown_progress() as progress:
        copied = asyncio.run(library.copy(source, target, read_at, kept_at, progress))
    if json:
        say_json(copied)
        return
    counts = table()
    for name, count in copied.counts.items():
        counts.add_row(name, f"{count:,}")
    console.print(counts)
    moved = "copied to" if read_at != kept_at else "left at"
    console.print(
        f"{copied.blobs} blobs ({decimal(copied.blobs_size_bytes)}) {moved} "
        f"{without_credentials(kept_at)}\n"
        f"both sides: sha256 {copied.sha256}\n"
        f"copied to [bold]{copied.target}[/]: complete, verified"
    )
