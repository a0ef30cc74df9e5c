"""The exposition text, once or from a port, by prometheus_client; loaded only where it is asked for.

A trainer never loads that library: PROMETHEUS_MULTIPROC_DIR, which inference engines set, would change every metric of
a process that inherits it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gpu_cache.hosts import HostRule
from gpu_cache.smi import figures, metrics
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process

# A scraper asks at once and reads at once; a client that does not must not keep a place.
_CLIENT_S = 10.0
# Beyond these the client that came first is dropped.
_MAX_CLIENTS = 32
_MAX_HEAD_BYTES = 16 << 10

logger = logging.getLogger(__name__)


class NodeCollector(Collector):
    """Looks at the machine at every scrape; registering takes no look."""

    def __init__(self, look: Callable[[], Node]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        found = metrics.exported(self._look())
        for metric in metrics.METRICS:
            yield _family(metric, found)
        for buckets in metrics.HISTOGRAMS:
            yield _histogram(buckets, found)


def text(look: Callable[[], Node]) -> str:
    """The text that a scrape gets."""
    return generate_latest(_registry(look)).decode()


def serve(look: Callable[[], Node], host: str, port: int, tell: Callable[[int], None]) -> None:
    """Answer scrapes until interrupted. `tell` takes the port, chosen by the system if `port` is 0.

    Raises:
        OSError: The port is taken, or the host is not of this machine.
    """
    family, _, _, _, location = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(location[:2], family=family) as listener:
        tell(listener.getsockname()[1])
        asyncio.run(Exporter(look, listener).run())


class Exporter:
    """A small HTTP server: few clients, each for a short time, one request each.

    Args:
        look: Finds what is exported; a thread looks once for each scrape, one after another.
        listener: Listens; the caller closes it.
    """

    def __init__(self, look: Callable[[], Node], listener: socket.socket) -> None:
        self._registry, self._listener = _registry(look), listener
        self._rule = HostRule(listener.getsockname()[0])
        # The client that came first is the first.
        self._serving: dict[asyncio.Task[None], None] = {}

    async def run(self) -> None:
        """Answer until cancelled; `asyncio.run` then drops the clients."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "gpu-cache-smi-look"))
        server = await asyncio.start_server(self._serve_client, sock=self._listener, limit=_MAX_HEAD_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._serving) >= _MAX_CLIENTS:  # one goes for each that comes; a look that has not begun is not taken
            first = next(iter(self._serving))
            del self._serving[first]
            first.cancel()
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = None
        try:
            await self._answer(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client went away, is too slow, or says too much
        finally:
            self._serving.pop(task, None)
            writer.transport.abort()  # the answer is sent, or the client does not want it

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_CLIENT_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, content_type, body = await asyncio.to_thread(self._reply, head)
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        writer.write(b"" if head.startswith("HEAD ") else body)
        async with asyncio.timeout(_CLIENT_S):
            writer.transport.set_write_buffer_limits(0)
            await writer.drain()
            writer.write_eof()
            await reader.read(1)  # the client closes when it has the answer; an abort before could take it away

    def _reply(self, head: str) -> tuple[str, str, bytes]:
        """Status, content type and body."""
        try:
            return self._scraped(head)
        except Exception:  # top of a request: the next look may go better
            logger.exception("a scrape failed")
            return "500 Internal Server Error", "text/plain", b"the look at this machine failed\n"

    def _scraped(self, head: str) -> tuple[str, str, bytes]:
        request, *lines = head.split("\r\n")
        named = [line.partition(":") for line in lines]
        headers = [(name.strip().lower(), value.strip()) for name, _, value in named]
        hosts, origins, accepted = (
            [value for name, value in headers if name == wanted] for wanted in ("host", "origin", "accept")
        )
        if not request.startswith(("GET ", "HEAD ")):
            return "405 Method Not Allowed", "text/plain", b"only GET\n"
        if (refusal := self._rule.refusal(hosts, origins)) is not None:
            return "403 Forbidden", "text/plain; charset=utf-8", f"{refusal}\n".encode()
        encode, content_type = choose_encoder(",".join(accepted))
        return "200 OK", content_type, encode(self._registry)


def _registry(look: Callable[[], Node]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(NodeCollector(look))
    return registry


def _family(metric: metrics.Metric, found: Mapping[tuple[str, ...], Process]) -> Metric:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.meaning, labels=[*metrics.COMMON_LABELS, *metric.labels])
    for common, process in found.items():
        if process.is_counted or metric.name == metrics.OF_THE_DEAD:
            for labels, value in metric.read(process):
                if value is not None:
                    family.add_metric([*common, *labels], value)
    return family


def _histogram(buckets: metrics.Buckets, found: Mapping[tuple[str, ...], Process]) -> Metric:
    family = HistogramMetricFamily(buckets.name, buckets.meaning, labels=metrics.COMMON_LABELS)
    for labels, process in found.items():
        of_process = figures.mapping(process.report, "histograms") if process.is_counted else {}
        histogram = figures.mapping(of_process, buckets.key)
        counts, total = figures.numbers(histogram, "counts"), figures.number(histogram, "sum")
        if len(counts) == len(buckets.edges) + 1 and total is not None:
            edges = [*(str(float(edge)) for edge in buckets.edges), "+Inf"]
            family.add_metric(labels, list(zip(edges, itertools.accumulate(counts), strict=True)), total)
    return family
