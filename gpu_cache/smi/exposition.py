"""The exposition text, once or from a port, by prometheus_client; loaded only where it is asked for.

A trainer never loads that library: PROMETHEUS_MULTIPROC_DIR, which inference engines set, would change every metric of
a process that inherits it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_cache.smi import figures, metrics
from gpu_cache.smi.metrics import Exported
from gpu_cache.smi.node import Node


class NodeCollector(Collector):
    """Looks at the machine at every scrape."""

    def __init__(self, look: Callable[[], Node]) -> None:
        self._look = look

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering takes no look."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        found = metrics.exported(self._look())
        for metric in metrics.METRICS:
            yield _family(metric, found)
        for buckets in metrics.HISTOGRAMS:
            yield _histogram(buckets, found)


def text(look: Callable[[], Node]) -> str:
    """What a scrape would get."""
    return generate_latest(_registry(look)).decode()


@contextmanager
def serving(look: Callable[[], Node], host: str, port: int) -> Iterator[int]:
    """Answers scrapes from threads of its own.

    Yields:
        The port, chosen by the system if `port` is 0.
    Raises:
        OSError: The port is taken, or the host is not of this machine.
    """
    server, thread = start_http_server(port, host, _registry(look))
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _registry(look: Callable[[], Node]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(NodeCollector(look))
    return registry


def _family(metric: metrics.Metric, found: list[Exported]) -> Metric:
    kind = CounterMetricFamily if metric.kind == metrics.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.meaning, labels=[*metrics.COMMON_LABELS, *metric.labels])
    for one in found:
        if one.process.is_counted or metric.name == metrics.OF_THE_DEAD:
            for labels, value in metric.read(one.process):
                if value is not None:
                    family.add_metric([*one.labels, *labels], value)
    return family


def _histogram(buckets: metrics.Buckets, found: list[Exported]) -> Metric:
    family = HistogramMetricFamily(buckets.name, buckets.meaning, labels=metrics.COMMON_LABELS)
    for one in found:
        of_process = figures.mapping(one.process.report, "histograms") if one.process.is_counted else {}
        histogram = figures.mapping(of_process, buckets.key)
        counts, total = figures.numbers(histogram, "counts"), figures.number(histogram, "sum")
        if len(counts) == len(buckets.edges) + 1 and total is not None:
            edges = [*(str(float(edge)) for edge in buckets.edges), "+Inf"]
            steps = list(zip(edges, itertools.accumulate(counts), strict=True))
            family.add_metric(one.labels, steps, total)
    return family
