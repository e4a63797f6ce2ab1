"""Figures of sweeps, from their records (`ptv2.sweeps`), and of all methods side by side.

One panel a record, so that a small sweep stands beside a large one. Every run is a dot with the 95 % interval over questions
(none where a run was not evaluated: then F1 is that on held-out questions); a line joins the means over seeds.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.plots import COLOURS, STYLE, label_ends
from ptv2.report import Result
from ptv2.sweeps import f1_by_point, trial_f1

INK = "#333333"
# Of Okabe and Ito's palette, which colour-blind people can tell apart; fine-tuning, which is no way to start a prefix, in black and grey.
START_COLOURS = {
    "activations": "#0072B2",
    "normal": "#D55E00",
    "zero": "#E69F00",
    "pretrained: recurring": "#56B4E9",
    "pretrained: cloze": "#CC79A7",
    "pretrained: mixed": "#009E73",
    "full fine-tuning": "#000000",
    "full fine-tuning, pretrained": "#7f7f7f",
}


def draw_length(records: list[dict]) -> Figure:
    """F1 against prefix length, on a log axis."""

    def draw(axes: Axes, record: dict) -> None:
        runs = [(trial["changes"]["prefix.prefix_length"], trial_f1(trial)) for trial in record["trials"]]
        _draw_series(axes, runs, COLOURS["p-tuning-v2"])
        _log_axis(axes, sorted({length for length, _ in runs}), base=2)
        axes.set_xlabel("prefix length P (log scale)")

    return _panels(records, draw)


def draw_depth(records: list[dict], num_layers: int) -> Figure:
    """F1 by which layers carry a prefix: above, the first k and the last k; below, each alone. Layers are numbered from 0."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, len(records), figsize=(5 * len(records), 7), layout="constrained", squeeze=False)
        for (above, below), record in zip(grid.T, records, strict=True):
            runs = [(_layers(trial, num_layers), trial_f1(trial)) for trial in record["trials"]]
            ends = []
            for name, colour, edge in (("first k", "#0072B2", 0), ("last k", "#D55E00", num_layers - 1)):
                chosen = [(len(layers), f1) for layers, f1 in runs if edge in layers and layers == list(range(layers[0], layers[-1] + 1))]
                ends += _draw_series(above, chosen, colour, name)
            above.set_ylim(0, _top(record))
            label_ends(above, ends)
            _draw_series(below, [(layers[0], f1) for layers, f1 in runs if len(layers) == 1], INK)
            above.set(xlabel="k, layers with a prefix", xlim=(0.5, num_layers + 1.3), xticks=range(1, num_layers + 1))
            below.set(
                xlabel="the only layer with a prefix (0 is next to the text)", xlim=(-0.5, num_layers - 0.5), xticks=range(num_layers)
            )
            above.set_title(_title(record), fontsize=10, loc="left")
            below.set_ylim(0, _top(record))
            for axes in (above, below):
                axes.set_ylabel(_ylabel(record))
    return figure


def _layers(trial: dict, num_layers: int) -> list[int]:
    return trial["changes"].get("prefix.layers") or list(range(num_layers))


def draw_points(records: list[dict]) -> Figure:
    """F1 of named points, one row each, by name from the top."""
    rows = max(len(f1_by_point(record)) for record in records)

    def draw(axes: Axes, record: dict) -> None:
        points = f1_by_point(record)
        for row, runs in enumerate(points.values()):
            places = row + 0.14 * (np.arange(len(runs)) - (len(runs) - 1) / 2)
            _draw_runs(axes, [run.value for run in runs], places, runs, COLOURS["p-tuning-v2"], sideways=True)
            axes.plot([np.mean([run.value for run in runs])] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.5)
        axes.set_yticks(range(len(points)), points)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xlim(0, _top(record))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_ylabel(record))

    return _panels(records, draw, width=6, height=1.5 + 0.45 * rows, ylabel=False)


def draw_search(record: dict) -> Figure:
    """F1 of a search's trials against each quantity that it searched: on a log axis, or side by side where there are few values."""
    names = list(dict.fromkeys(name for trial in record["trials"] for name in trial["changes"]))
    columns = min(3, len(names))
    with plt.rc_context(STYLE):
        size = (3.2 * columns, 2.3 * -(-len(names) // columns))
        figure, grid = plt.subplots(-(-len(names) // columns), columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, name in itertools.zip_longest(grid.flat, names):
            if name is None:
                axes.set_visible(False)
                continue
            runs = [(trial["changes"][name], trial_f1(trial).value) for trial in record["trials"]]
            values = sorted({value for value, _ in runs})
            if few := len(values) <= 4:
                axes.set_xticks(range(len(values)), [str(value) for value in values])
                axes.set_xlim(-0.5, len(values) - 0.5)
            else:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_minor_formatter(NullFormatter())
            places = [values.index(x) if few else x for x, _ in runs]
            axes.plot(places, [f1 for _, f1 in runs], "o", color=COLOURS["p-tuning-v2"], alpha=0.8)
            axes.set_xlabel(name.rpartition(".")[2].replace("_", " "))
            axes.set_ylim(0, _top(record))
        for axes in grid[:, 0]:
            axes.set_ylabel("F1 on held-out\nquestions, %")
    return figure


def draw_few_shot(records: list[dict]) -> Figure:
    """F1 against the number of training questions, one line a start; the records are those of `join_by_start`."""

    def draw(axes: Axes, record: dict) -> None:
        ends = []
        for start, colour in START_COLOURS.items():
            runs = [(trial["train_questions"], trial_f1(trial)) for trial in record["trials"] if trial["start"] == start]
            ends += _draw_series(axes, runs, colour, start)
        _log_axis(axes, sorted({trial["train_questions"] for trial in record["trials"]}))
        label_ends(axes, ends)
        axes.set_xlabel("training questions (log scale)")

    return _panels(records, draw, width=4.8, height=3.3)


def draw_how_soon(records: list[dict]) -> Figure:
    """F1 on held-out questions along the training on the most questions, one line a run, coloured by its start."""

    def draw(axes: Axes, record: dict) -> None:
        most = max(trial["train_questions"] for trial in record["trials"])
        ends = []
        for start, colour in START_COLOURS.items():
            curves = [t["curve"] for t in record["trials"] if (t["start"], t["train_questions"]) == (start, most)]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=colour, marker=".", linewidth=1.2)
            if curves:
                ends.append((start, curves[0][-1][0], float(np.mean([curve[-1][1] for curve in curves])), colour))
        axes.set_ylim(bottom=0)
        label_ends(axes, ends)
        axes.set_xlabel("windows trained on")
        axes.set_ylabel("F1 on held-out questions, %")

    return _panels(records, draw, width=4.8, height=3.3, ylabel=False)


def draw_tradeoff(results: list[Result], small: dict | None, published: dict) -> Figure:
    """F1 against trained numbers on a log axis, with published systems as lines.

    Args:
        results: evaluated runs; filled dots.
        small: record of a sweep over methods; hollow dots.
        published: as `ptv2.evaluation.published_record` makes it, of the same questions.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
        tops: dict[str, tuple[float, float, str]] = {}
        for title, colour, share, f1, form, hollow in _dots(results, small):
            _draw_runs(axes, [share], [f1.value], [f1], colour, form=form, hollow=hollow)
            tops[title] = share, max(f1.high, tops.get(title, (share, 0))[1]), colour
        _label_tops(axes, tops)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.1)
        _draw_published(axes, published)
        axes.set_ylim(0, 100)
        axes.set_xlabel("trained numbers, % of the backbone's (log scale)")
        axes.set_ylabel(f"F1 on {_short(published['data'])}, % (bars: 95 % interval)")
        kinds = [f"● {_windows(results)} windows"] + ([f"○ {_windows_seen(small)} windows"] if small else [])
        axes.set_title("    ".join([*kinds, "- - published systems"]), fontsize=10, loc="left")
    return figure


def _label_tops(axes: Axes, tops: dict[str, tuple[float, float, str]]) -> None:
    """Name each method above its highest dot, or at the left of it where a neighbour's dot is in the way; where two names would
    meet, the right one goes higher."""
    placed: list[tuple[float, float]] = []
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for title, (share, top, colour) in sorted(tops.items(), key=lambda item: item[1]):
        height = top + 1
        if any(0 < abs(np.log10(other / share)) < 0.5 and 0 < taken - top < 7 for other, taken, _ in tops.values()):
            axes.annotate(title, (share, top), xytext=(-8, -6), textcoords="offset points", color=colour, va="center", ha="right", bbox=box)
            continue
        while any(abs(np.log10(share / other)) < 0.7 and abs(height - taken) < 5 for other, taken in placed):
            height += 1
        placed.append((share, height))
        axes.annotate(title, (share, height), color=colour, va="bottom", ha="center", bbox=box)


def _dots(results: list[Result], small: dict | None) -> Iterator[tuple[str, str, float, Interval, str, bool]]:
    """Title, colour, trained numbers in percent of the backbone's, F1, matplotlib's marker, and whether that is hollow."""
    for trial in small["trials"] if small else []:
        share = 100 * trial["parameters"]["trained"] / trial["parameters"]["backbone"]
        method = trial["changes"]["method"]
        yield METHODS[method].title, COLOURS[method], share, trial_f1(trial), "o", True
    for result in results:
        yield (
            result.title,
            COLOURS[result.method],
            result.share,
            Interval(**result.evaluation["f1"]),
            "^" if result.is_pretrained else "o",
            False,
        )


def _draw_published(axes: Axes, published: dict) -> None:
    """Dashed lines with their names at the left; systems less than 2 points apart share a label."""
    groups: list[list[tuple[str, float]]] = []
    for name, scores in sorted(published["systems"].items(), key=lambda item: item[1]["f1"]["value"]):
        f1 = scores["f1"]["value"]
        axes.axhline(f1, color="#8c8c8c", linewidth=1, linestyle=(0, (5, 4)), zorder=0)
        if not groups or f1 - groups[-1][-1][1] >= 2:
            groups.append([])
        groups[-1].append((name.partition(" (")[0], f1))
    for group, after in itertools.zip_longest(groups, groups[1:]):
        below = after is not None and after[0][1] - group[-1][1] < 5  # no room above
        axes.annotate(
            ", ".join(name for name, _ in group), (0.01, group[0][1] if below else group[-1][1]), xycoords=("axes fraction", "data"),
            xytext=(0, -2 if below else 2), textcoords="offset points", color="#595959", fontsize=9, va="top" if below else "bottom",
        )  # fmt: skip


def _windows(results: list[Result]) -> str:
    return _range([result.run["steps"] * result.windows_per_step for result in results])


def _windows_seen(record: dict) -> str:
    return _range([trial["windows_seen"] for trial in record["trials"]])


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _panels(records: list[dict], draw: Callable[[Axes, dict], None], width: float = 5, height: float = 4.2, ylabel: bool = True) -> Figure:
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(1, len(records), figsize=(width * len(records), height), layout="constrained", squeeze=False)
        for axes, record in zip(row[0], records, strict=True):
            if ylabel:
                axes.set_ylabel(_ylabel(record))
                axes.set_ylim(0, _top(record))
            draw(axes, record)
            axes.set_title(_title(record), fontsize=10, loc="left")
    return figure


def _title(record: dict) -> str:
    """How much was trained on what, in which precision if one was chosen, and with how many seeds."""
    seeds = [len(runs) for runs in f1_by_point(record).values()]
    data = " + ".join(_short(source) for source in record["config"]["train_data"])
    precision = record["config"]["precision"]
    data += "" if precision == "auto" else f", {precision}"
    return f"{_windows_seen(record)} windows of {data}\n{_range(seeds)} {'seed' if max(seeds) == 1 else 'seeds'} a point"


def _top(record: dict) -> float:
    """The upper end of an F1 axis that starts at 0, so that small differences look small."""
    return max(1.0, 1.12 * max(trial_f1(trial).high for trial in record["trials"]))


def _ylabel(record: dict) -> str:
    evaluation = record["trials"][0]["evaluation"]
    return f"F1 on {_short(evaluation['data'])}, %" if evaluation else "F1 on held-out questions, %"


def _short(source: str) -> str:
    """A data set's name as people read it: without folder, version and suffix."""
    name = source.rstrip("/").rpartition("/")[2].partition(".json")[0]
    return name.removeprefix("squadshifts_").partition("_v1.")[0]


def _draw_series(axes: Axes, runs: list[tuple[float, Interval]], colour: str, name: str = "") -> list[tuple[str, float, float, str]]:
    """Runs as dots, a line through the means; where and how to label its right end."""
    if not runs:
        return []
    _draw_runs(axes, [x for x, _ in runs], [f1.value for _, f1 in runs], [f1 for _, f1 in runs], colour)
    places = sorted({x for x, _ in runs})
    means = [float(np.mean([f1.value for at, f1 in runs if at == x])) for x in places]
    axes.plot(places, means, color=colour, linewidth=1.5)
    return [(name, places[-1], means[-1], colour)]


def _draw_runs(axes: Axes, x, y, runs: list[Interval], colour: str, form: str = "o", hollow: bool = False, sideways: bool = False) -> None:
    errors = np.array([[run.value - run.low for run in runs], [run.high - run.value for run in runs]])
    face = "white" if hollow else colour
    along = {"xerr" if sideways else "yerr": errors}
    axes.errorbar(x, y, **along, fmt=form, color=colour, markerfacecolor=face, markersize=5, capsize=2, elinewidth=0.8, alpha=0.85)


def _log_axis(axes: Axes, ticks: list[int], base: float = 10) -> None:
    axes.set_xscale("log", base=base)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
