"""Every figure drawn from data: one style, colour-blind safe, labelled directly. `ptv2.report` reads the records."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image  # matplotlib's own

from ptv2 import records
from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.report import Result

# Okabe and Ito's palette, distinguishable with every common colour vision (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "p-tuning-v2": "#0072B2",
    "fine-tuning": "#D55E00",
    "head-only": "#737373",
    "lora": "#009E73",
    "prompt-tuning": "#CC79A7",
    "bitfit": "#E69F00",
}
# A notebook's picture has 1.5 times the pixels that it takes on the page, for sharp lines on fine screens and on paper.
PNG_DPI, SCREEN_DPI = 144, 96
STYLE = {
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "svg.hashsalt": "ptv2",  # the same records give the same file
}


def show(figure, name: str, data: object, output_dir: str | Path) -> None:
    """Display a figure once, as PNG, in a notebook, and keep it beside the data that it was drawn from.

    Args:
        figure: of matplotlib; it is closed.
        name: of the files, and what a reader without pictures gets.
        data: what was drawn, as JSON can hold it.
        output_dir: where NAME.svg, NAME.png and NAME.json go; "" keeps none.
    """
    from IPython.display import display  # the notebooks extra

    picture = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(picture, format="png", dpi=PNG_DPI)
        png = _with_palette(picture)
        if output_dir:
            path = Path(output_dir) / name
            records.write_json(path.with_name(f"{name}.json"), data)  # makes the folder, too
            path.with_name(f"{name}.png").write_bytes(png)
            figure.savefig(path.with_name(f"{name}.svg"), metadata={"Date": None})
    plt.close(figure)
    width = round(figure.get_figwidth() * SCREEN_DPI)
    shown = {"image/png": base64.b64encode(png).decode(), "text/plain": f"Figure: {name}"}
    display(shown, raw=True, metadata={"image/png": {"width": width, "alt": name.replace("_", " ")}})


def _with_palette(picture: io.BytesIO) -> bytes:
    """A picture with 256 colours, as many as drawings need: a third of the bytes, and notebooks that code hosts show."""
    png = io.BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, "png", optimize=True)
    return png.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG and PNG, beside each other under this name; it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for suffix in (".svg", ".png"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def draw_prefix_attention(shares: np.ndarray) -> Figure:
    """Heat map of the share of attention that goes to the prefix.

    Args:
        shares: 0 to 1, float [N, H], layers by heads.
    """
    N, H = shares.shape
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(1.8 + 0.46 * H, 1.2 + 0.42 * N), layout="constrained")
        _draw_shares(axes, shares)
        for layer, head in np.ndindex(N, H):
            axes.text(
                head, layer, f"{100 * shares[layer, head]:.0f}", ha="center", va="center", fontsize=9,
                color="white" if shares[layer, head] < 0.5 else "black",
            )  # fmt: skip
        axes.set_xticks(range(H), range(1, H + 1))
        axes.set_xlabel("head")
    return figure


def draw_prefix_attention_along_text(shares: np.ndarray, tokens: Sequence[str]) -> Figure:
    """Heat map of the share of its attention that each token gives to the prefix.

    Args:
        shares: 0 to 1, float [N, tokens].
    """
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(10, 1.9 + 0.28 * len(shares)), layout="constrained")
        _draw_shares(axes, shares)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7.5, family="monospace")
        axes.tick_params(axis="x", length=0)
    return figure


def _draw_shares(axes, shares: np.ndarray) -> None:
    drawn = axes.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks(range(len(shares)), range(1, len(shares) + 1))
    axes.set_ylabel("layer, from the text up")
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(drawn, label="attention to\nthe prefix, %", pad=0.015)


def draw_training(run: Result, recorded: list[Result], untrained_f1: float) -> Figure:
    """Two panels: a run's loss, and its F1 on held-out questions, in front of recorded runs.

    Args:
        recorded: drawn in grey; windows run on a log axis, for these may be much longer.
        untrained_f1: before the first step, in percent.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        _draw_log(left, "loss", run, recorded)
        _draw_log(right, "eval_f1", run, recorded)
        for axes, x, side in ((left, 0.98, "right"), (right, 0.02, "left")):  # the corners that curves of learning leave empty
            axes.text(x, 0.97, "this run", color=COLOURS[run.method], transform=axes.transAxes, ha=side, va="top")
            axes.text(x, 0.90, "recorded runs" if recorded else "", color="#666666", transform=axes.transAxes, ha=side, va="top")
        left.set_ylabel("loss on training windows, nats")
        right.set_ylabel("F1 on the run's own held-out questions, %")
        right.axhline(untrained_f1, color=COLOURS[run.method], linewidth=1, linestyle=":")
        right.annotate(
            "untrained", (1, untrained_f1), xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points",
            color=COLOURS[run.method], ha="right", va="top",
        )  # fmt: skip
    return figure


def _draw_log(axes, name: str, run: Result, recorded: list[Result]) -> None:
    """What training logged under a name, against windows seen."""
    for result in [*recorded, run]:
        log = [entry for entry in result.run["log_history"] if name in entry]
        windows = [entry["step"] * result.windows_per_step for entry in log]
        values = [entry[name] for entry in log]
        if result is run:
            axes.plot(windows, values, color=COLOURS[run.method], linewidth=2, marker="o", markersize=4, zorder=3)
        else:
            axes.plot(windows, values, color="#a6a6a6", linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("windows trained on (log scale)")
    axes.margins(y=0.14)


def draw_rows(rows: Sequence[str], series: dict[str, Sequence[float | Interval]], xlabel: str) -> Figure:
    """One row a name, the first on top: a bar for a plain number, a dot with its interval for an `Interval`.

    Args:
        series: at most four, whose values stand side by side in each row; their names stand on top, each in its colour.
    """
    colours = [COLOURS[method] for method in ("p-tuning-v2", "fine-tuning", "head-only", "lora")]
    height = 0.8 / len(series)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 1.1 + len(rows) * (0.2 + 0.2 * len(series))), layout="constrained")
        for index, (name, values) in enumerate(series.items()):
            colour, places = colours[index], np.arange(len(rows)) + (index - (len(series) - 1) / 2) * height
            if isinstance(values[0], Interval):
                centre, low, high = np.array([(each.value, each.low, each.high) for each in values]).T
                axes.errorbar(centre, places, xerr=(centre - low, high - centre), fmt="o", color=colour, capsize=3, label=name)
            else:
                bars = axes.barh(places, values, height=0.9 * height, color=colour, label=name)
                axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=9, color=colour)
        axes.axvline(0, color="#333333", linewidth=1)
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        if len(series) > 1:
            figure.legend(
                loc="outside upper left", ncols=len(series), frameon=False, labelcolor="linecolor", handlelength=1.2, columnspacing=1.2
            )
    return figure


def draw_comparison(results: list[Result], path: Path) -> None:
    """Two panels, as SVG and PNG: F1 against trained numbers, and F1 on held-out questions along the training.

    Args:
        path: of the figure; both formats are written beside each other under its name.
    """
    results = [result for result in results if not result.is_export]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        _draw_f1_against_size(left, [result for result in results if result.evaluation])
        _draw_learning_curves(right, results)
    save(figure, path)


def _draw_f1_against_size(axes, results: list[Result]) -> None:
    labelled = set()
    for result in results:
        f1 = result.evaluation["f1"]
        colour = COLOURS[result.method]
        errors = [[f1["value"] - f1["low"]], [f1["high"] - f1["value"]]]
        form = "^" if result.is_pretrained else "o"
        axes.errorbar(result.share, f1["value"], yerr=errors, fmt=form, color=colour, markersize=6, capsize=3, elinewidth=1)
        if result.method not in labelled:
            labelled.add(result.method)
            right_half = result.share > 1
            axes.annotate(
                METHODS[result.method].title, (result.share, f1["value"]), xytext=(-9 if right_half else 9, 0),
                textcoords="offset points", color=colour, va="center", ha="right" if right_half else "left",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("trained numbers, % of the backbone's (log scale)")
    axes.set_ylabel("F1, % (bars: 95 % interval)")
    names = sorted({result.evaluation["data"] for result in results})
    pretrained = "    ▲ from a pretrained prefix" if any(result.is_pretrained for result in results) else ""
    axes.set_title("\n".join(names) + pretrained, fontsize=10, loc="left")


def _draw_learning_curves(axes, results: list[Result]) -> None:
    ends: dict[str, tuple[float, float]] = {}
    for result in results:
        log = [entry for entry in result.run["log_history"] if "eval_f1" in entry]
        steps = [entry["step"] * result.windows_per_step / 1000 for entry in log]
        f1 = [entry["eval_f1"] for entry in log]
        line = "--" if result.is_pretrained else "-"
        axes.plot(steps, f1, marker=".", color=COLOURS[result.method], linewidth=1.2, alpha=0.85, linestyle=line)
        ends.setdefault(result.method, (steps[-1], f1[-1]))
    longest = max(x for x, _ in ends.values())
    for method, (x, y) in ends.items():
        side = "right" if x > longest / 2 else "left"  # away from the axes
        axes.annotate(METHODS[method].title, (x, y), xytext=(0, 8), textcoords="offset points", color=COLOURS[method], ha=side)
    axes.margins(y=0.15)
    axes.set_xlabel("windows trained on, thousands")
    axes.set_ylabel("F1 on held-out training articles, %")
    pretrained = ", dashed from a pretrained prefix" if any(result.is_pretrained for result in results) else ""
    axes.set_title(f"while training{pretrained}", fontsize=10, loc="left")


def label_ends(axes: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Name lines at their right ends, kept apart by a sixteenth of the axis, which has its limits by then.

    Args:
        ends: name, x, y and colour of each.
    """
    low, high = axes.get_ylim()
    last = -np.inf
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        last = max(y, last + (high - low) / 16)
        axes.annotate(name, (x, last), xytext=(12, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False)
