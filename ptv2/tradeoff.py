"""F1 against trained numbers: what each method pays for what it reaches, with published systems as lines."""

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.plots import COLOURS, STYLE
from ptv2.report import Result, short_name
from ptv2.sweep_plots import draw_runs, lowest_to_highest
from ptv2.sweep_scores import trial_f1


@dataclass(frozen=True)
class _Dot:
    """A run: its method's title and colour, trained numbers in percent of the backbone's, F1 in percent, and matplotlib's marker."""

    title: str
    colour: str
    share: float
    f1: Interval
    form: str
    hollow: bool


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
        for dot in _dots(results, small):
            draw_runs(axes, [dot.share], [dot.f1.value], [dot.f1], dot.colour, form=dot.form, hollow=dot.hollow)
            tops[dot.title] = dot.share, max(dot.f1.high, tops.get(dot.title, (dot.share, 0))[1]), dot.colour
        _label_tops(axes, tops)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.1)
        _draw_published(axes, published)
        axes.set_ylim(0, 100)
        axes.set_xlabel("trained numbers, % of the backbone's (log scale)")
        axes.set_ylabel(f"F1 on {short_name(published['data'])}, % (bars: 95 % interval)")
        kinds = [f"● {lowest_to_highest([result.run['steps'] * result.windows_per_step for result in results])} windows"]
        if small:
            kinds.append(f"○ {lowest_to_highest([trial['windows_seen'] for trial in small['trials']])} windows")
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


def _dots(results: list[Result], small: dict | None) -> list[_Dot]:
    dots = []
    for trial in small["trials"] if small else []:
        share = 100 * trial["parameters"]["trained"] / trial["parameters"]["backbone"]
        method = trial["changes"]["method"]
        dots.append(_Dot(METHODS[method].title, COLOURS[method], share, trial_f1(trial), "o", hollow=True))
    for result in results:
        form = "^" if result.is_pretrained else "o"
        dots.append(_Dot(result.title, COLOURS[result.method], result.share, Interval(**result.evaluation["f1"]), form, hollow=False))
    return dots


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
