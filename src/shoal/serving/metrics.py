"""Figures for dashboards and autoscalers, at `/metrics`.

Names that begin with `vllm:` are vLLM's, because that is what dashboards look for, and mean what they mean there. Names
that begin with `shoal:` are about the ring: where a token's time goes, stage by stage, which no other server tells.
All times are differences of one process's monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.runtime.messages import EngineDescription, Finished
from shoal.runtime.node.metrics import ClusterCollector
from shoal.runtime.node.owner import ClusterStatus
from shoal.serving.catalogue import Catalogue

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_HOP_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.2, 1.0)


class Metrics:
    """All figures of one HTTP server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model_name",), buckets=buckets, registry=registry)

        def stage_gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ("model_name", "device"), registry=registry)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self.success = counter("vllm:request_success", "Answers that were completed.", "finished_reason")
        self.cache_queries = counter("vllm:prefix_cache_queries", "Tokens looked for in the cache.")
        self.cache_hits = counter("vllm:prefix_cache_hits", "Tokens found in the cache.")
        self.preemptions = counter("vllm:num_preemptions", "Answers interrupted for others; there are none.")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "From token to token.", _TOKEN_SECONDS)
        self.per_token = histogram("vllm:time_per_output_token_seconds", "The same, by its older name.", _TOKEN_SECONDS)
        self.latency = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting for a turn.", _SECONDS)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Reading the prompt.", _SECONDS)
        self.decode = histogram("vllm:request_decode_time_seconds", "Writing the answer.", _SECONDS)
        self.request_prompt = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.request_generation = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.failures = counter("shoal:request_failures", "Requests without a complete answer, by cause.", "cause")
        self.hop = histogram("shoal:hop_seconds", "A hop of the ring: a token's time less all computing.", _HOP_SECONDS)
        self.stage_compute = stage_gauge("shoal:stage_compute_seconds", "Computing per token, median of the last answer.")
        self.stage_wait = stage_gauge("shoal:stage_wait_seconds", "Waiting for other stages, per token.")
        self.stage_disk = stage_gauge("shoal:stage_disk_wait_seconds", "Waiting for weights from disk, per token.")
        self.stage_wire = stage_gauge("shoal:stage_wire_seconds", "Sending and receiving, per token.")
        self.stage_layers = stage_gauge("shoal:stage_layers", "Layers that a device holds.")
        self.stage_memory = stage_gauge("shoal:stage_memory_bytes", "Memory that a device's stage takes.")
        self.link_bytes = Counter(
            "shoal:link_bytes",
            "Hidden states that a device has sent on, in bytes.",
            ("model_name", "device"),
            registry=registry,
        )
        self.cache_usage = Gauge(
            "vllm:kv_cache_usage_perc", "Share of the context that the last answer filled, 0 to 1.", ("model_name",),
            registry=registry,
        )  # fmt: skip

    def watch(self, catalogue: Catalogue) -> None:
        """Adds what is read from the models whenever somebody looks."""
        self._registry.register(_Live(catalogue))

    def watch_cluster(self, ask: Callable[[], ClusterStatus | None]) -> None:
        """Adds what this device knows of its cluster: `ask` is called for each page, and may take its time."""
        self._registry.register(ClusterCollector(ask))

    def begin(self, model: str, *, arrived_s: float) -> RequestTiming:
        """For one answer whose turn it is."""
        return RequestTiming(self, model, arrived_s=arrived_s)

    def page(self) -> bytes:
        return generate_latest(self._registry)


class RequestTiming:
    """Stamps of one answer."""

    def __init__(self, metrics: Metrics, model: str, *, arrived_s: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self._gaps_s: list[float] = []
        """Between tokens; told at the end of the answer, because histograms take their time."""
        metrics.queue.labels(model).observe(time.monotonic() - arrived_s)

    def token(self) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        else:
            self._gaps_s.append(now_s - self._last_s)
        self._last_s = now_s

    def finish(self, finished: Finished, engine: EngineDescription | None) -> None:
        self._tell_tokens()
        metrics, model, num_tokens = self._metrics, self._model, len(finished.token_ids)
        metrics.prompt_tokens.labels(model).inc(finished.prompt_tokens)
        metrics.generation_tokens.labels(model).inc(num_tokens)
        metrics.success.labels(model, finished.reason).inc()
        metrics.cache_queries.labels(model).inc(finished.prompt_tokens)
        metrics.cache_hits.labels(model).inc(finished.cached_tokens)
        metrics.latency.labels(model).observe(time.monotonic() - self._arrived_s)
        metrics.prefill.labels(model).observe(finished.prefill_s)
        metrics.decode.labels(model).observe(finished.decode_s)
        metrics.request_prompt.labels(model).observe(finished.prompt_tokens)
        metrics.request_generation.labels(model).observe(num_tokens)
        hop = metrics.hop.labels(model)
        for hop_us in finished.hop_us[:512]:
            hop.observe(hop_us / 1e6)
        if engine is None:
            return
        metrics.cache_usage.labels(model).set((finished.prompt_tokens + num_tokens) / engine.context)
        num_computed = finished.prompt_tokens - finished.cached_tokens + max(0, num_tokens - 1)
        for stage in engine.stages if len(engine.stages) > 1 else ():
            metrics.link_bytes.labels(model, stage.device).inc(4 * engine.hidden_size * num_computed * len(stage.windows))
        for stage, times in zip(engine.stages, finished.stages, strict=False):
            labels = (model, stage.device)
            metrics.stage_compute.labels(*labels).set(times.compute_s)
            metrics.stage_wait.labels(*labels).set(times.wait_s)
            metrics.stage_disk.labels(*labels).set(times.disk_s)
            metrics.stage_wire.labels(*labels).set(times.wire_s)
            metrics.stage_layers.labels(*labels).set(sum(map(len, stage.windows)))
            metrics.stage_memory.labels(*labels).set(stage.memory_bytes)

    def fail(self, error: BaseException) -> None:
        self._tell_tokens()
        cause = "cancelled" if not isinstance(error, Exception) else type(error).__name__
        self._metrics.failures.labels(self._model, cause).inc()

    def _tell_tokens(self) -> None:
        if self._first_s is not None:
            self._metrics.first_token.labels(self._model).observe(self._first_s - self._arrived_s)
        for histogram in (self._metrics.inter_token, self._metrics.per_token):
            observe = histogram.labels(self._model).observe
            for gap_s in self._gaps_s:
                observe(gap_s)


class _Live(Collector):
    """What is true at the moment of asking."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def collect(self) -> list[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests being answered.", labels=["model_name"])
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests in line.", labels=["model_name"])
        loaded = GaugeMetricFamily("shoal:model_loaded", "1 where the model is in memory.", labels=["model_name"])
        for model in self._catalogue.models:
            running.add_metric([model.id], model.num_running)
            waiting.add_metric([model.id], model.num_waiting)
            loaded.add_metric([model.id], int(model.state == "ready"))
        loads = CounterMetricFamily("shoal:model_loads", "Models loaded.", value=self._catalogue.num_loads)
        return [running, waiting, loaded, loads]
