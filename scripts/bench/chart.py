"""The chart of a benchmark's rows: how fast batches arrive, what a shard costs, how that grows with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench import scale
from bench.targets import COLD, HOST_TARGETS, Target

Row = Mapping[str, Any]
Limits = tuple[float, float]  # wanted and stretch; zeros where there are none
_NO_LIMITS: Limits = (0.0, 0.0)

# Shown at 800 pixels in a README: 8 inches of type that is meant for 100 dots an inch.
_WIDTH_IN, _HEIGHT_IN, DPI = 8.0, 8.2, 200
# Colours that the colour-blind can tell apart, after Okabe and Ito (2008).
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
_TEXT, _LINES = "#24292F", "#D8DEE4"

# The shortest bar and the lowest mark are at so many times the value where the axis begins: numbers fit before them.
_ROOM = 4

_WORKLOADS = {
    "rollout": ("small shards", _BLUE),
    "distillation": ("logits", _ORANGE),
    "vision": ("pixels", _GREEN),
}
_ARRIVALS = {
    "raw": "raw socket",
    "samehost/cold": "shared memory",
    "tuned/cold": "HTTP, preallocated",
    "defaults/cold": "HTTP, at defaults",
    "defaults/cold+torch": "HTTP, busy torch",
    "defaults/cold+python": "HTTP, busy Python",
    "json": "AReaL's JSON",
}
_SHARD_COSTS = {
    "json": "AReaL's JSON",
    "tuned/cold": "cold, preallocated",
    "tuned/warm": "cached, preallocated",
    "defaults/cold": "cold, at defaults",
    "samehost/cold": "cold, shared memory",
    "defaults/warm": "cached, at defaults",
    "defaults/warm+python": "cached, busy Python",
    "defaults/localized": "localized before",
}
_OPERATIONS = {"insert": _ORANGE, "clear": _GREEN, "hit": _BLUE}
_TARGETS = {target.what: target for target in HOST_TARGETS}


def draw(rows: Sequence[Row]) -> Figure:
    """Three panels; what was not measured is left out."""
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.5, 1], hspace=0.06, wspace=0.06)
    _draw_arrivals(figure.add_subplot(grid[0, :]), rows)
    _draw_shard_costs(figure.add_subplot(grid[1, 0]), rows)
    _draw_growth(figure.add_subplot(grid[1, 1]), rows)
    return figure


def _draw_arrivals(axes: Axes, rows: Sequence[Row]) -> None:
    """GB/s of each path, a bar for each workload."""
    rates = {(row["workload"], row["path"]): row["gb_per_s"] for row in rows if row["gb_per_s"]}
    shown = [name for name in _WORKLOADS if any(workload == name for workload, _ in rates)]
    height = 0.8 / max(1, len(shown))
    measured = [path for path in _ARRIVALS if any((workload, path) in rates for workload in shown)]
    for place, path in enumerate(measured):
        for number, workload in enumerate(shown):
            if (rate := rates.get((workload, path))) is not None:
                at = place + (number - (len(shown) - 1) / 2) * height
                axes.barh(at, rate, height * 0.92, color=_WORKLOADS[workload][1], alpha=0.55 if path == "raw" else 1)
                _mark(axes, _arrival_limits(workload, path, rates), at, height)
                _label(axes, rate, at, _TEXT if path == "raw" or workload == "distillation" else "white")
    for workload in shown:
        axes.barh([0], [0], color=_WORKLOADS[workload][1], label=f"{workload}: {_WORKLOADS[workload][0]}")
    _finish_bars(axes, "localize over loopback: GB/s, tensors in hand", [_ARRIVALS[path] for path in measured], 5)


def _arrival_limits(workload: str, path: str, rates: Mapping[tuple[str, str], float]) -> Limits:
    """Wanted and stretch in GB/s."""
    target = _TARGETS.get(f"{workload} cold, of raw") if path == COLD else None
    limit = rates.get((workload, "raw"))
    if target and limit and target.stretch:
        return target.wanted * limit, target.stretch * limit
    return _NO_LIMITS


def _draw_shard_costs(axes: Axes, rows: Sequence[Row]) -> None:
    """Microseconds per shard of the workload rollout."""
    costs = {row["path"]: row["us_per_shard"] for row in rows if row["workload"] == "rollout" and row["us_per_shard"]}
    goals = {f"defaults/{name}": f"rollout {name}" for name in ("cold", "warm", "localized")}
    measured = [path for path in _SHARD_COSTS if path in costs]
    for place, path in enumerate(measured):
        axes.barh(place, costs[path], 0.6, color=_GREY if path == "json" else _BLUE)
        _mark(axes, _limits(_TARGETS[f"{goals[path]}, us per shard"]) if path in goals else _NO_LIMITS, place, 0.72)
        _label(axes, costs[path], place, "white")
    _finish_bars(axes, "rollout: µs a shard", [_SHARD_COSTS[path] for path in measured], 2)


def _draw_growth(axes: Axes, rows: Sequence[Row]) -> None:
    """Microseconds per entry of the index and of a dict, by number of entries."""
    for operation, colour in _OPERATIONS.items():
        for structure, style in {"index": "-o", "dict": ":"}.items():
            line = sorted(
                (row["num_entries"], row["us_per_shard"])
                for row in rows
                if row["workload"] == scale.NAME and row["path"] == f"{structure}_{operation}"
            )
            label = f"index, {operation}" if structure == "index" else ("a bare dict" if operation == "hit" else None)
            if line:
                axes.plot(*zip(*line, strict=True), style, color=colour, label=label, markersize=3.5, linewidth=1.6)
        target = _TARGETS[f"scale index, us per {operation}"]
        axes.plot([scale.SIZES[-1]], [target.wanted], "_", color=colour, markersize=14, markeredgewidth=2.5)
    axes.plot([], [], "_", color=_TEXT, markersize=11, markeredgewidth=2.5, label="target")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(scale.SIZES, ["1,000", "10,000", "100,000", "1 million"])
    _finish(
        axes,
        "scale: µs an entry, by number",
        axes.yaxis,
        loc="upper left",
        bbox_to_anchor=(-0.05, -0.06),
        ncols=3,
    )


def _limits(target: Target) -> Limits:
    return target.wanted, target.wanted if target.stretch is None else target.stretch


def _mark(axes: Axes, limits: Limits, at: float, height: float) -> None:
    """A line where a figure must be, and a dotted one where it would be best."""
    for limit, style in zip(limits, ("-", ":"), strict=True):
        if limit:
            axes.plot([limit, limit], [at - height / 2, at + height / 2], style, color=_RED, linewidth=2)


def _label(axes: Axes, figure: float, at: float, colour: str) -> None:
    """The number at the beginning of a bar: at its end there are marks."""
    style: dict[str, Any] = {"color": colour, "fontsize": 8.5, "fontweight": "bold", "va": "center"}
    where = axes.get_yaxis_transform()  # from the left edge, at this height
    axes.annotate(_digits(figure), (0, at), (4, -0.5), xycoords=where, textcoords="offset points", **style)


def _finish_bars(axes: Axes, title: str, names: Sequence[str], num_columns: int) -> None:
    """Names, the logarithmic axis, the legend beneath."""
    axes.set_xscale("log")
    bars = [bar.get_width() for bar in axes.patches if bar.get_width()]
    marks = [float(line.get_xdata()[0]) for line in axes.lines]
    axes.set_xlim(left=min([*bars, *marks], default=1.0) / _ROOM)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.plot([], [], "-", color=_RED, linewidth=2, label="target")
    axes.plot([], [], ":", color=_RED, linewidth=2, label="stretch")
    legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.06), "ncols": num_columns}
    _finish(axes, title, axes.xaxis, **legend)


def _finish(axes: Axes, title: str, values: Axis, **legend: Any) -> None:
    """A title, a grid behind, logarithmic values in 1, 2 and 5, a legend."""
    axes.set_title(title, loc="left", color=_TEXT, fontsize=10.5, fontweight="bold")
    axes.minorticks_off()
    values.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    values.set_minor_locator(NullLocator())
    values.set_major_formatter(lambda value, _: f"{value:g}")
    values.grid(True, color=_LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=8, labelcolor=_TEXT, frameon=False, columnspacing=1.2, handlelength=1.5, **legend)


def _digits(figure: float) -> str:
    """Two digits that mean something."""
    places = 0 if figure >= 10 else 1 if figure >= 1 else 2 if figure >= 0.1 else 3
    return f"{figure:.{places}f}"
