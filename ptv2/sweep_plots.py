"""Figures of sweeps, from their records (`ptv2.sweeps`).

One panel a record, so that a small sweep stands beside a large one. Where no function says otherwise, every run is a dot with the 95 %
interval over questions (none where a run was not evaluated: then F1 is that on held-out questions), and a line joins the means over seeds.
"""

import itertools
from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import offset_copy

from ptv2.metrics import Interval
from ptv2.plots import COLOURS, STYLE, label_ends
from ptv2.report import short_name
from ptv2.sweep_scores import f1_by_point, f1_by_start, over_seeds, trial_f1

INK = "#333333"
SEED_GAP = 5  # points between the dots of one place
START_GAP = 2.5  # and between those of two starts
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
            draw_runs(axes, [run.value for run in runs], places, runs, COLOURS["p-tuning-v2"], sideways=True)
            axes.plot([over_seeds(runs).value] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.5)
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
    """F1 against the number of training questions, one line a start; the records are those of `join_by_start`.

    So many runs would hide each other: a dot is a mean over seeds, its bar goes from the lowest to the highest.
    """

    def draw(axes: Axes, record: dict) -> None:
        found = f1_by_start(record)
        starts = [start for start in START_COLOURS if start in found]
        every = sorted({trial["train_questions"] for trial in record["trials"]})
        ends = []
        for index, start in enumerate(starts):
            counts, f1, colour = list(found[start]), list(found[start].values()), START_COLOURS[start]
            shift = START_GAP * (index - (len(starts) - 1) / 2)
            draw_runs(axes, counts, [mean.value for mean in f1], f1, colour, form="o-", shift=shift)
            ends.append((start, every[-1], f1[-1].value, colour))
        _log_axis(axes, every)
        axes.set_xlim(every[0] / 1.3, every[-1] * 1.3)
        label_ends(axes, ends)
        axes.set_xlabel("training questions (log scale)")

    return _panels(records, draw, width=6, height=4.5)


def draw_how_soon(records: list[dict]) -> Figure:
    """F1 on held-out questions along the training on the most questions: by start, the mean over seeds, and their range as a band."""

    def draw(axes: Axes, record: dict) -> None:
        most = max(trial["train_questions"] for trial in record["trials"])
        ends = []
        for start, colour in START_COLOURS.items():
            curves = [t["curve"] for t in record["trials"] if (t["start"], t["train_questions"]) == (start, most)]
            if not curves:
                continue
            windows, f1 = [point[0] for point in curves[0]], np.array([[point[1] for point in curve] for curve in curves])
            axes.fill_between(windows, f1.min(0), f1.max(0), color=colour, alpha=0.12, linewidth=0)
            axes.plot(windows, f1.mean(0), color=colour, marker=".", linewidth=1.2)
            ends.append((start, windows[-1], float(f1.mean(0)[-1]), colour))
        axes.set_ylim(bottom=0)
        label_ends(axes, ends)
        axes.set_xlabel("windows trained on")
        axes.set_ylabel("F1 on held-out questions, %")

    return _panels(records, draw, width=6, height=4, ylabel=False)


def lowest_to_highest(counts: list[int]) -> str:
    """ "2,000", or "2,000 to 8,000" where they differ."""
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
    data = " + ".join(short_name(source) for source in record["config"]["train_data"])
    precision = record["config"]["precision"]
    data += "" if precision == "auto" else f", {precision}"
    windows = lowest_to_highest([trial["windows_seen"] for trial in record["trials"]])
    return f"{windows} windows of {data}\n{lowest_to_highest(seeds)} {'seed' if max(seeds) == 1 else 'seeds'} a point"


def _top(record: dict) -> float:
    """The upper end of an F1 axis that starts at 0, so that small differences look small."""
    return max(1.0, 1.12 * max(trial_f1(trial).high for trial in record["trials"]))


def _ylabel(record: dict) -> str:
    evaluation = record["trials"][0]["evaluation"]
    return f"F1 on {short_name(evaluation['data'])}, %" if evaluation else "F1 on held-out questions, %"


def _draw_series(axes: Axes, runs: list[tuple[float, Interval]], colour: str, name: str = "") -> list[tuple[str, float, float, str]]:
    """Runs as dots, a line through the means; where and how to label its right end."""
    if not runs:
        return []
    places: dict[float, list[Interval]] = {}
    for x, f1 in sorted(runs, key=lambda run: run[0]):
        places.setdefault(x, []).append(f1)
    for x, seeds in places.items():
        for index, f1 in enumerate(seeds):
            draw_runs(axes, [x], [f1.value], [f1], colour, shift=SEED_GAP * (index - (len(seeds) - 1) / 2))
    means = [over_seeds(seeds).value for seeds in places.values()]
    axes.plot(list(places), means, color=colour, linewidth=1.5)
    return [(name, max(places), means[-1], colour)]


def draw_runs(
    axes: Axes, x, y, runs: list[Interval], colour: str, form: str = "o", hollow: bool = False, sideways: bool = False, shift: float = 0
) -> None:
    """Dots at x, y with the runs' intervals, upright or sideways.

    Args:
        form: a marker of matplotlib's, and "-" behind it for a line that joins the dots.
        shift: to the right, in points, so that seeds of one place stand side by side on any scale.
    """
    errors = np.array([[run.value - run.low for run in runs], [run.high - run.value for run in runs]])
    along, face = {"xerr" if sideways else "yerr": errors}, "white" if hollow else colour
    if shift:  # only then, for limits don't take such dots in; the line through them does
        along["transform"] = offset_copy(axes.transData, axes.figure, shift, 0, units="points")
    axes.errorbar(x, y, **along, fmt=form, color=colour, markerfacecolor=face, markersize=4, capsize=2, elinewidth=0.8, alpha=0.85)


def _log_axis(axes: Axes, ticks: list[int], base: float = 10) -> None:
    axes.set_xscale("log", base=base)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
