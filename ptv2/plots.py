"""Every figure drawn from data: one style, colour-blind safe, labelled directly. `ptv2.report` reads the records."""

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ptv2 import records
from ptv2.methods import METHODS
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
        figure.savefig(picture, format="png", dpi=PNG_DPI, metadata={"Software": None})
        if output_dir:
            path = Path(output_dir) / name
            records.write_json(path.with_name(f"{name}.json"), data)  # makes the folder, too
            path.with_name(f"{name}.png").write_bytes(picture.getvalue())
            figure.savefig(path.with_name(f"{name}.svg"), metadata={"Date": None})
    plt.close(figure)
    width = round(figure.get_figwidth() * SCREEN_DPI)
    shown = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": f"Figure: {name}"}
    display(shown, raw=True, metadata={"image/png": {"width": width, "alt": name.replace("_", " ")}})


def draw_prefix_attention(shares: np.ndarray) -> Figure:
    """Heat map of the share of attention that goes to the prefix.

    Args:
        shares: 0 to 1, float [N, H], layers by heads.
    """
    N, H = shares.shape
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(1.8 + 0.46 * H, 1.2 + 0.42 * N), layout="constrained")
        drawn = axes.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for layer, head in np.ndindex(N, H):
            axes.text(
                head, layer, f"{100 * shares[layer, head]:.0f}", ha="center", va="center", fontsize=9,
                color="white" if shares[layer, head] < 0.5 else "black",
            )  # fmt: skip
        axes.set_xticks(range(H), range(1, H + 1))
        axes.set_yticks(range(N), range(1, N + 1))
        axes.set_xlabel("head")
        axes.set_ylabel("layer, from the text up")
        axes.spines[:].set_visible(False)
        figure.colorbar(drawn, label="attention to the prefix, %")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".svg", ".png"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
        plt.close(figure)


def _draw_f1_against_size(axes, results: list[Result]) -> None:
    labelled = set()
    for result in results:
        f1 = result.evaluation["f1"]
        colour = COLOURS[result.method]
        errors = [[f1["value"] - f1["low"]], [f1["high"] - f1["value"]]]
        axes.errorbar(result.share, f1["value"], yerr=errors, fmt="o", color=colour, markersize=6, capsize=3, elinewidth=1)
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
    axes.set_title("\n".join(names), fontsize=10, loc="left")


def _draw_learning_curves(axes, results: list[Result]) -> None:
    ends: dict[str, tuple[float, float]] = {}
    for result in results:
        log = [entry for entry in result.run["log_history"] if "eval_f1" in entry]
        steps = [entry["step"] * result.windows_per_step / 1000 for entry in log]
        f1 = [entry["eval_f1"] for entry in log]
        axes.plot(steps, f1, marker=".", color=COLOURS[result.method], linewidth=1.2, alpha=0.85)
        ends.setdefault(result.method, (steps[-1], f1[-1]))
    longest = max(x for x, _ in ends.values())
    for method, (x, y) in ends.items():
        side = "right" if x > longest / 2 else "left"  # away from the axes
        axes.annotate(METHODS[method].title, (x, y), xytext=(0, 8), textcoords="offset points", color=COLOURS[method], ha=side)
    axes.margins(y=0.15)
    axes.set_xlabel("windows trained on, thousands")
    axes.set_ylabel("F1 on held-out training articles, %")
    axes.set_title("while training", fontsize=10, loc="left")
