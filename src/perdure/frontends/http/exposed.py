"""What `/metrics` shows: the stats structs of the node and of the server, by name."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from perdure.frontends.http.metrics import Exposition, struct_metrics
from perdure.frontends.http.service import Service
from perdure.services.jobs import JobCounts
from perdure.services.usage import DiskUse

_ENGINE_TEXTS = {
    "commits": "Batches committed.",
    "groups": "Groups of batches made durable together.",
    "conflicts": "Batches refused by a precondition.",
    "sync_s": "Seconds spent making groups durable.",
    "sync_last_s": "Seconds the last group took to become durable.",
    "log_size_bytes": "Size of the write-ahead log.",
    "stored_size_bytes": "Size of the store.",
    "queued": "Batches waiting to be committed.",
}
_ENGINE_GAUGES = frozenset({"sync_last_s", "log_size_bytes", "stored_size_bytes", "queued"})
_RECOVERED = ("loaded", "replayed", "cut", "requeued", "interrupted", "orphaned", "damaged")


def exposition(service: Service) -> Exposition:
    """Everything that is counted, read when it is asked for."""
    return Exposition((service.requests.collect, lambda: _serving(service), lambda: _node(service)))


def _serving(service: Service) -> Iterable[Metric]:
    yield from struct_metrics(
        "perdure_stream", service.streams.stats, {}, gauges=frozenset({"open"})
    )
    yield from struct_metrics("perdure_connections", service.connections, {})


def _node(service: Service) -> Iterable[Metric]:
    node = service.node
    yield _gauge("perdure_ready", "Whether traffic is welcome.", node.readiness().ready)
    yield _gauge("perdure_startup_seconds", "Duration of the start.", node.startup.duration_s)
    recovered = GaugeMetricFamily(
        "perdure_recovered", "What the last recovery found.", labels=("surface", "what")
    )
    for found in node.startup.recovery:
        for what in _RECOVERED:
            recovered.add_metric((found.surface, what), getattr(found, what))
    yield recovered
    if not node.opened:
        return
    engine = node.state.engine
    yield _gauge("perdure_engine_latched", "Whether writes are refused.", bool(engine.latched))
    if (sharding := node.sharding) is not None:
        down = sum(shard.down is not None for shard in sharding.shards)
        yield _gauge("perdure_shards_down", "Shards that do not answer.", down)
    yield _gauge("perdure_boot_number", "How often this instance was started.", node.boot.number)
    yield from struct_metrics("perdure_engine", engine.stats, _ENGINE_TEXTS, gauges=_ENGINE_GAUGES)
    yield from _upstreams(service)
    yield from _disk_use(node.measuring.last)
    yield from struct_metrics("perdure_blobs", node.blobs.stats, {})
    yield from _jobs(node.jobs.counts())
    yield from struct_metrics("perdure_runs", node.gateway.stats, {}, gauges=frozenset({"running"}))


_UPSTREAM_TEXTS = {
    "requests": "Requests sent to an upstream, repeats included.",
    "retries": "Requests sent again.",
    "failures": "Requests that got no answer, or not all of it.",
    "refused": "Requests not sent, because the circuit was open.",
}


def _upstreams(service: Service) -> Iterable[Metric]:
    """Each upstream under the name the configuration gives it."""
    members = service.node.upstreams.members
    for field, text in _UPSTREAM_TEXTS.items():
        counted = CounterMetricFamily(f"perdure_upstream_{field}", text, labels=("upstream",))
        for member in members:
            counted.add_metric((member.name,), getattr(member.upstream.stats, field))
        yield counted
    opened = CounterMetricFamily(
        "perdure_upstream_circuit_opened", "Times the circuit opened.", labels=("upstream",)
    )
    circuit = GaugeMetricFamily(
        "perdure_upstream_circuit_open", "Whether requests are refused.", labels=("upstream",)
    )
    streaming = GaugeMetricFamily(
        "perdure_upstream_streaming", "Answers being read.", labels=("upstream",)
    )
    for member in members:
        opened.add_metric((member.name,), member.upstream.breaker.opened)
        circuit.add_metric((member.name,), member.upstream.breaker.open)
        streaming.add_metric((member.name,), member.upstream.stats.streaming)
    yield from (opened, circuit, streaming)


def _jobs(counts: JobCounts) -> Iterable[Metric]:
    family = GaugeMetricFamily("perdure_jobs", "Jobs that have not ended.", labels=("status",))
    for status in ("queued", "running", "waiting"):
        family.add_metric((status,), getattr(counts, status))
    yield family
    yield _gauge(
        "perdure_jobs_oldest_queued_age_s",
        "Seconds the longest in the queue has waited.",
        counts.oldest_queued_age_s,
    )


def _disk_use(last: DiskUse | None) -> Iterable[Metric]:
    """As it was measured last; when that was is a metric too."""
    if last is None:
        return
    family = GaugeMetricFamily(
        "perdure_surface_size_bytes", "What a surface takes on the disk.", labels=("surface",)
    )
    for one in last.surfaces:
        family.add_metric((one.surface,), one.size_bytes)
    yield family
    yield _gauge("perdure_free_size_bytes", "Room in the store's file.", last.free_bytes)
    yield _gauge("perdure_blob_store_blobs", "Blobs stored.", last.blobs)
    yield _gauge("perdure_blob_store_size_bytes", "What blobs take.", last.blobs_bytes)
    yield _gauge("perdure_usage_measured_at_s", "When sizes were measured.", last.measured_at_s)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
