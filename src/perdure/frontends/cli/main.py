"""The command line. Every error raised on purpose ends as one line and an exit code, here."""

from __future__ import annotations

import sys

import typer

from perdure import __version__
from perdure.core.errors import PerdureError
from perdure.frontends.cli.backup import backup, restore
from perdure.frontends.cli.contract import contract
from perdure.frontends.cli.copy import copy
from perdure.frontends.cli.demo import demo
from perdure.frontends.cli.migrate import migrate
from perdure.frontends.cli.objects import conversations, files, jobs, responses
from perdure.frontends.cli.output import exit_code, say_error
from perdure.frontends.cli.prune import prune
from perdure.frontends.cli.reshard import reshard
from perdure.frontends.cli.salvage import salvage
from perdure.frontends.cli.serve import serve
from perdure.frontends.cli.status import status
from perdure.frontends.cli.torture import torture
from perdure.frontends.cli.verify import verify
from perdure.frontends.cli.workers import workers

app = typer.Typer(
    name="perdure",
    help="The durable state plane of LLM services.",
    epilog="Exit codes: 0 yes, 1 no, 2 invalid request or usage, 3 missing, 4 conflict, "
    "5 unavailable, 6 damaged, 7 closed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    serve,
    demo,
    status,
    contract,
    verify,
    salvage,
    backup,
    restore,
    copy,
    migrate,
    prune,
    reshard,
    torture,
)
for command in COMMANDS:
    app.command()(command)
for group in (responses, conversations, files, jobs, workers):
    app.add_typer(group)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"perdure {__version__}")
        raise typer.Exit


@app.callback()
def _perdure(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


def main() -> None:
    """The console script."""
    try:
        app()
    except PerdureError as error:
        say_error(error, as_json="--json" in sys.argv)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
