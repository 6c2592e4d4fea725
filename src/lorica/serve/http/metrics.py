"""The text of /metrics: vLLM's names behind ``lorica:``, among them the gauge that Kubernetes routes by."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lorica.serve.engine import Entry, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAMES = 100
"""Adapters that have a label of their own; the others share ``other``."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_WINDOW = 10.0
"""Seconds over which the page's throughput is a mean."""


class Metrics:
    """Counts and durations of one server.

    Args:
        stats: the engine's counts of now.
        entries: the adapters.
        model: name of the base.
    """

    def __init__(
        self, stats: Callable[[], Stats], entries: Callable[[], Iterable[Entry]], model: str
    ) -> None:
        """Make the counters, in a registry of their own."""
        self.registry = CollectorRegistry()
        self._names: dict[str | None, str] = {None: model}
        self._recent: deque[tuple[float, int, int]] = deque()
        self.begun = time.time()

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"lorica:{name}", text, labels, buckets=_SECONDS, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorica:{name}", text, labels, registry=self.registry)

        self._http = counter("http_requests", "Requests by endpoint and status.", "endpoint", "status")
        self._http_seconds = histogram("http_request_seconds", "Duration of requests.", "endpoint")
        self._requests = counter("requests", "Answers that began, by adapter.", "adapter")
        self._finished = counter("request_success", "Answers that ended, by reason.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "adapter")
        self._generated = counter("generation_tokens", "Tokens of answers.", "adapter")
        self._first = histogram("time_to_first_token_seconds", "From the request to the first token.")
        self._between = histogram("inter_token_latency_seconds", "From a token to the next.")
        self._whole = histogram("e2e_request_latency_seconds", "From the request to the last token.")
        self._load = histogram("adapter_load_seconds", "Loading an adapter over HTTP.")
        self.registry.register(_OfTheEngine(stats, entries, model))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def label(self, adapter: str | None) -> str:
        """An adapter's label: the first hundred by their names."""
        if adapter not in self._names:
            if len(self._names) > _NAMES:
                return "other"
            self._names[adapter] = str(adapter)
        return self._names[adapter]

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request of HTTP is over."""
        self._http.labels(endpoint, str(status)).inc()
        self._http_seconds.labels(endpoint).observe(seconds)

    def began(self, adapter: str | None, tokens: int) -> None:
        """An answer was admitted, to a prompt of so many tokens."""
        label = self.label(adapter)
        self._requests.labels(label).inc()
        self._prompt.labels(label).inc(tokens)
        self._note(tokens, 0)

    def stepped(self, adapter: str | None, tokens: int, since: float, *, first: bool) -> None:
        """Tokens of an answer came, so many seconds after the last ones, or after the request."""
        self._generated.labels(self.label(adapter)).inc(tokens)
        if first:
            self._first.observe(since)
        else:
            for _ in range(tokens):
                self._between.observe(since / tokens)
        self._note(0, tokens)

    def ended(self, reason: str, seconds: float) -> None:
        """An answer is whole, or was cut off."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def loaded(self, seconds: float) -> None:
        """An adapter was loaded."""
        self._load.observe(seconds)

    def _note(self, read: int, written: int) -> None:
        now = time.monotonic()
        self._recent.append((now, read, written))
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def throughput(self) -> dict[str, float]:
        """Tokens a second, read and written, over the last ten seconds."""
        since = time.monotonic() - _WINDOW
        recent = [(read, written) for when, read, written in self._recent if when >= since]
        return {
            "prompt_tokens_per_second": sum(read for read, _ in recent) / _WINDOW,
            "generated_tokens_per_second": sum(written for _, written in recent) / _WINDOW,
        }


class _OfTheEngine(Collector):
    """The engine's own counts, asked for when they are read."""

    def __init__(
        self, stats: Callable[[], Stats], entries: Callable[[], Iterable[Entry]], model: str
    ) -> None:
        self._stats, self._entries, self._model = stats, entries, model

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the registry would ask the engine for it."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats, entries = self._stats(), list(self._entries())
        gauges: dict[str, tuple[str, Any]] = {
            "num_requests_waiting": ("Requests that wait.", stats.waiting),
            "num_requests_running": ("Requests in the batch.", stats.running),
            "kv_cache_usage_perc": ("Share of the cache in use, 0 to 1.", stats.cache_use),
            "adapter_slots": ("Slots for adapters.", stats.slots),
            "adapters_listed": ("Adapters that are served.", len(entries)),
            "adapters_resident": (
                "Adapters in memory.",
                sum(entry.state in ("resident", "mounted") for entry in entries),
            ),
            "adapters_mounted": ("Adapters in slots.", len(stats.mounted)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"lorica:{name}", text, value=value)
        counters = {
            "prefix_cache_queries": ("Tokens of prompts.", stats.prompt_tokens_total),
            "prefix_cache_hits": ("Tokens of prompts that the prefix cache had.", stats.cached_tokens_total),
            "engine_steps": ("Forward passes.", stats.steps_total),
            "adapter_mounts": ("Copies of an adapter into a slot.", stats.mounts_total),
            "adapter_evictions": ("Adapters that left a slot for another.", stats.evictions_total),
            "slot_waits": ("Requests that waited for a slot.", stats.slot_waits_total),
            "queue_timeouts": ("Requests that waited too long.", stats.timeouts_total),
            "engine_restarts": ("Times that the engine was started again.", stats.restarts_total),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"lorica:{name}", text, value=value)
        lora = GaugeMetricFamily(
            "lorica:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = (",".join(sorted(used)) for used in (stats.running_adapters, stats.waiting_adapters))
        lora.add_metric([str(stats.slots), *names], time.time())
        yield lora


def joined(parts: Sequence[tuple[str, bytes]]) -> bytes:
    """The figures of several servers as one text; each has the label ``replica``.

    Args:
        parts: each server's name, and its text.
    """
    registry = CollectorRegistry()
    registry.register(_OfSeveral(parts))
    return generate_latest(registry)


class _OfSeveral(Collector):
    """Families of the same name from several servers, as one."""

    def __init__(self, parts: Sequence[tuple[str, bytes]]) -> None:
        self._parts = parts

    def describe(self) -> list[Metric]:
        """Nothing beforehand."""
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._parts:
            for family in text_string_to_metric_families(text.decode()):
                own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    own.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        return families.values()
