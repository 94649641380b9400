"""`perdure status`: is it running, is it ready, and what did its last start recover."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
import typer
from rich.filesize import decimal

from perdure.core.clock import SystemClock
from perdure.core.engine import Sharding
from perdure.core.values import Finding
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import (
    EXIT_NOT_READY,
    EXIT_NOT_RUNNING,
    console,
    moment,
    recovered,
    say_json,
    seconds,
    table,
)
from perdure.frontends.cli.store import ask, holder
from perdure.library import open as open_store
from perdure.services.config import Config
from perdure.services.jobs import JobCounts
from perdure.services.reports import InstanceState, StartupReport, instance_state, last_seen
from perdure.services.shards import shard_warnings
from perdure.services.usage import DiskUse
from perdure.surfaces.boots import Boot, Phase, SurfaceRecovery

_SHOWN = 100


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`startup` is the running server's own report; without one, `last_boot` is what is stored, and
    `damaged` what of that cannot be read."""

    running: bool
    ready: bool
    pid: int | None
    data: str
    engine: str
    startup: StartupReport | None
    last_boot: Boot | None
    instances: list[InstanceState]
    usage: DiskUse | None = None
    jobs: JobCounts | None = None
    damaged: list[Finding] = []
    shards: Sharding | None = None


class _Usage(msgspec.Struct):
    last: DiskUse | None
    jobs: JobCounts


class _Instances(msgspec.Struct):
    data: list[InstanceState]


def status(
    data: Data = None, engine: Engine = None, config: ConfigFile = None, json: AsJson = False
) -> None:
    """Say whether a server runs on this data, and what was recovered.

    Exits with 0 when it is ready, 1 when it runs and is not ready, 3 when none runs.
    """
    settings = configured(config, data=data, engine=engine)
    found = asyncio.run(_status(settings))
    if json:
        say_json(found)
    else:
        _show(found)
    if not found.running:
        raise typer.Exit(EXIT_NOT_RUNNING)
    if not found.ready:
        raise typer.Exit(EXIT_NOT_READY)


async def _status(config: Config) -> Status:
    held = await holder(config)
    if held is None:
        return await _stored(config)
    startup = await ask(held, "/v1/startup", StartupReport)
    instances = await ask(held, f"/v1/instances?limit={_SHOWN}", _Instances)
    usage = await ask(held, "/v1/usage", _Usage)
    return Status(
        running=True,
        ready=startup.ready,
        pid=held.pid,
        data=config.data,
        engine=config.engine_shown,
        startup=startup,
        last_boot=None,
        instances=instances.data,
        usage=usage.last,
        jobs=usage.jobs,
        shards=startup.shards,
    )


async def _stored(config: Config) -> Status:
    """What the store says of servers that are gone."""
    async with open_store(config.engine_url, read_only=True) as state:
        seen = await last_seen(state)
        clock = SystemClock()
        instances = [instance_state(one, state, clock, running="") for one in seen.instances]
        shards = state.sharding
    return Status(
        running=False,
        ready=False,
        pid=None,
        data=config.data,
        engine=config.engine_shown,
        startup=None,
        last_boot=seen.boot,
        instances=instances[:_SHOWN],
        damaged=seen.damaged,
        shards=shards,
    )


def _show(found: Status) -> None:
    if found.startup is None:
        console.print(f"[bold]not running[/] on {found.engine}")
        _show_findings(found.damaged)
        _show_warnings(shard_warnings(found.shards))
        _show_shards(found.shards)
        _show_last(found.last_boot)
        return
    report = found.startup
    word = "[bold green]ready[/]" if found.ready else "[bold red]not ready[/]"
    console.print(f"{word}: process {found.pid} on {found.engine}")
    before = {None: "the first here", True: "the one before ended clean"}.get(
        report.previous_ended_clean, "the one before did not end clean"
    )
    console.print(
        f"boot {report.number} ({before}), perdure {report.version}, "
        f"started in {seconds(report.duration_s)}"
    )
    checks = table()
    for check in report.checks:
        checks.add_row(f"  {check.name}", "ok" if check.ok else "[red]no[/]", check.reason)
    console.print(checks)
    _show_warnings(report.warnings)
    _show_shards(found.shards)
    _show_recovery(report.recovery, report.phases)
    if found.jobs is not None:
        _show_jobs(found.jobs)
    if found.usage is not None:
        _show_usage(found.usage)


def _show_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"  [yellow]warning[/] {warning}")


def _show_shards(sharding: Sharding | None) -> None:
    if sharding is None:
        return
    console.print("shards")
    rows = table()
    for shard in sharding.shards:
        kinds = [("primary", shard.primary), ("keeps partitions", shard.member)]
        kept = ", ".join(kind for kind, holds in kinds if holds) or "nothing lives in it"
        shown = kept if shard.id else "never seen"
        rows.add_row(f"  {shard.id or '?'}", shard.url, "[red]down[/]" if shard.down else shown)
    console.print(rows)


def _show_jobs(jobs: JobCounts) -> None:
    oldest = f" (the first for {seconds(jobs.oldest_queued_age_s)})" if jobs.queued else ""
    console.print(
        f"jobs: {jobs.running} running, {jobs.queued} queued{oldest}, "
        f"{jobs.waiting} waiting to be tried again"
    )


def _show_usage(usage: DiskUse) -> None:
    console.print(
        f"disk: {decimal(usage.total_bytes)} as of {moment(usage.measured_at_s)} UTC, "
        f"{decimal(usage.free_bytes)} of it free for what comes"
    )
    rows = table()
    for one in usage.surfaces:
        rows.add_row(f"  {one.surface}", decimal(one.size_bytes))
    rows.add_row("  the engine's own", decimal(usage.other_bytes))
    rows.add_row(f"  {usage.blobs} blobs, beside it", decimal(usage.blobs_bytes))
    console.print(rows)


def _show_last(boot: Boot | None) -> None:
    if boot is None:
        console.print("no boot is recorded here")
        return
    ended = "ended clean" if boot.ended_clean else "did not end clean: it was killed"
    console.print(f"its last boot, number {boot.number} (process {boot.pid}), {ended}")
    _show_recovery(boot.recovery, boot.phases)


def _show_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        console.print(f"  [red]{finding.kind}[/] {finding.where}: {finding.why}")


def _show_recovery(recovery: tuple[SurfaceRecovery, ...], phases: tuple[Phase, ...]) -> None:
    console.print("recovered")
    rows = table()
    for found in recovery:
        told = recovered(found) or "nothing to do"
        rows.add_row(f"  {found.surface}", told, seconds(found.duration_s))
    console.print(rows)
    for found in recovery:
        _show_findings(found.findings)
    steps = ", ".join(f"{phase.name} {seconds(phase.duration_s)}" for phase in phases)
    console.print(f"phases: {steps}")
