"""/metrics in Prometheus' format."""

from __future__ import annotations

import sys
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import MmchatError
from .observing import Observation
from .openai_api import is_allowed


class Metrics:
    """Counts what ``ObservedEngine`` tells.

    Args:
        waiting: how many questions wait now.

    Raises:
        MmchatError: the client library is missing.
    """

    def __init__(self, waiting: Callable[[], int]):
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MmchatError("The metrics need one more package: pip install prometheus-client") from error
        self._prometheus = prometheus
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)  # memory and CPU time
        self.questions = prometheus.Counter(
            "mmchat_questions", "Questions by outcome", ["kind", "outcome", "cached"], registry=registry
        )
        self.errors = prometheus.Counter("mmchat_errors", "Errors by kind", ["kind"], registry=registry)
        self.first = prometheus.Histogram(
            "mmchat_first_token_seconds",
            "Time to the first token",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.speed = prometheus.Histogram(
            "mmchat_tokens_per_second",
            "Speed of an answer after its first token",
            buckets=(1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500),
            registry=registry,
        )
        self.tokens = prometheus.Counter("mmchat_tokens", "Tokens written", registry=registry)
        self.speech = prometheus.Counter("mmchat_speech_seconds", "Speech understood", registry=registry)
        queue = prometheus.Gauge("mmchat_queue_length", "Questions that wait", registry=registry)
        queue.set_function(waiting)
        gpu = prometheus.Gauge("mmchat_gpu_memory_bytes", "GPU memory in use by tensors", registry=registry)
        gpu.set_function(_gpu_memory)

    def observe(self, seen: Observation) -> None:
        """Counts a request."""
        if seen.failed:
            self.errors.labels(seen.outcome).inc()
        self.questions.labels(seen.kind, "failed" if seen.failed else seen.outcome, str(seen.cached).lower()).inc()
        self.speech.inc(seen.speech_seconds)
        if seen.first_seconds is None or seen.cached:
            return
        self.tokens.inc(seen.pieces)
        self.first.observe(seen.first_seconds)
        if seen.pieces > 1 and seen.seconds > seen.first_seconds:
            self.speed.observe((seen.pieces - 1) / (seen.seconds - seen.first_seconds))

    def route(self, key: str | None) -> Route:
        """The route, which asks for the API's key if there is one."""

        async def answer(request: Request) -> Response:
            if not is_allowed(request, key):
                return Response("This server needs its API key.", 401)
            content = self._prometheus.generate_latest(self.registry)
            return Response(content, media_type=self._prometheus.CONTENT_TYPE_LATEST)

        return Route("/metrics", answer)


def _gpu_memory() -> float:
    torch = sys.modules.get("torch")
    return float(torch.cuda.memory_allocated()) if torch and torch.cuda.is_initialized() else 0.0
