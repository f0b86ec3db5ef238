"""Metrics for Prometheus. Every name begins with `ia3_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of a server.

    Args:
        gauges: returns the current `queue`, `adapters` and the numbers of `Engine.statistics`.
    """

    def __init__(self, gauges: Callable[[], dict[str, Any]]) -> None:
        self._registry = CollectorRegistry()
        made: Any = {"registry": self._registry}
        self._requests = Counter("ia3_requests", "Requests", ["method", "route", "status"], **made)
        self._seconds = Histogram(
            "ia3_request_seconds",
            "Time from a request's head to the end of its response",
            ["route"],
            buckets=_SECONDS,
            **made,
        )
        self._rows = Histogram("ia3_batch_rows", "Rows of a pass through the model", ["kind"], buckets=_ROWS, **made)
        self._mixed = Histogram(
            "ia3_batch_adapters", "Different adapters of a pass through the model", ["kind"], buckets=_ROWS, **made
        )
        self._tokens = Counter("ia3_generated_tokens", "Tokens generated", **made)
        self._gauges = gauges
        self._registry.register(self)  # type: ignore[arg-type]

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, kind: str, rows: int, adapters: int) -> None:
        """Count a pass through the model; called on any thread."""
        self._rows.labels(kind).observe(rows)
        self._mixed.labels(kind).observe(adapters)

    def generated(self, tokens: int) -> None:
        """Count generated tokens."""
        self._tokens.inc(tokens)

    def collect(self) -> Iterator[Any]:
        """The current values of the gauges."""
        found = self._gauges()
        for key, name, text in (
            ("queue", "ia3_queue_length", "Texts accepted and not yet answered"),
            ("adapters", "ia3_adapters", "Adapters served"),
            ("resident", "ia3_adapters_resident", "Adapters in memory"),
        ):
            if key in found:
                yield GaugeMetricFamily(name, text, value=found[key])
        for key, name, text in (
            ("hits", "ia3_adapter_hits", "Adapters of batches that were in memory"),
            ("misses", "ia3_adapter_misses", "Adapters of batches that had to be loaded"),
            ("evictions", "ia3_adapter_evictions", "Adapters that made room for others"),
        ):
            if key in found:
                yield CounterMetricFamily(name, text, value=found[key])

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
