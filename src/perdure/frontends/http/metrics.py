"""Metrics, pulled: components count in plain structs and only this module knows Prometheus.

Labels are bounded: route templates, methods, statuses and surface names; never an id or a tenant.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

MEDIA = b"text/plain; version=0.0.4; charset=utf-8"

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class _Latency:
    __slots__ = ("buckets", "total_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS_S) + 1)
        self.total_s = 0.0


class RequestStats:
    """Requests by route, and how long each took to its answer (a stream: to its beginning)."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, int], int] = {}
        self.latencies: dict[tuple[str, str], _Latency] = {}
        self.active = 0

    def observe(self, method: str, template: str, status: int, duration_s: float) -> None:
        counted = (method, template, status)
        self.counts[counted] = self.counts.get(counted, 0) + 1
        latency = self.latencies.get((method, template))
        if latency is None:
            latency = self.latencies[(method, template)] = _Latency()
        latency.buckets[bisect_left(BUCKETS_S, duration_s)] += 1
        latency.total_s += duration_s

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "perdure_http_requests",
            "Requests answered.",
            labels=("method", "route", "status"),
        )
        for (method, template, status), count in self.counts.items():
            requests.add_metric((method, template, str(status)), count)
        yield requests
        seconds = HistogramMetricFamily(
            "perdure_http_request_seconds",
            "Time to the whole answer, or to the beginning of a stream.",
            labels=("method", "route"),
        )
        for labels, latency in self.latencies.items():
            seconds.add_metric(labels, _cumulative(latency), latency.total_s)
        yield seconds
        yield GaugeMetricFamily(
            "perdure_http_requests_active", "Requests being answered now.", value=self.active
        )


class Exposition:
    """Renders what its sources say when they are asked."""

    def __init__(self, sources: Iterable[Callable[[], Iterable[Metric]]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        for source in sources:
            self._registry.register(_Source(source))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)


def struct_metrics(
    prefix: str,
    stats: msgspec.Struct,
    texts: Mapping[str, str],
    *,
    gauges: frozenset[str] = frozenset(),
) -> Iterable[Metric]:
    """Every numeric field of a stats struct: counters, except those named in `gauges`."""
    for name in stats.__struct_fields__:
        value = getattr(stats, name)
        if isinstance(value, int | float):
            family = GaugeMetricFamily if name in gauges else CounterMetricFamily
            yield family(f"{prefix}_{name}", texts.get(name, name.replace("_", " ")), value=value)


class _Source:
    """What prometheus_client calls a collector."""

    def __init__(self, source: Callable[[], Iterable[Metric]]) -> None:
        self.collect = source

    def describe(self) -> Iterable[Metric]:
        return ()


def _cumulative(latency: _Latency) -> list[tuple[str, float]]:
    total = 0
    rows = []
    for bound, count in zip((*BUCKETS_S, float("inf")), latency.buckets, strict=True):
        total += count
        rows.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return rows
