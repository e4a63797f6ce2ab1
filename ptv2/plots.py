"""Every figure, and the table that goes with it, from records alone: one style, colour-blind safe, labelled directly."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from ptv2 import records
from ptv2.errors import InputError
from ptv2.methods import METHODS
from ptv2.training import RUN_FILE

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
OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"
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


@dataclass(frozen=True)
class Result:
    """A training run and, where it was evaluated, its score on other questions.

    Args:
        name: of the run's directory or record.
        run: the content of run.json.
        evaluation: the content of evaluation.json beside it, or None.
    """

    name: str
    run: dict
    evaluation: dict | None

    @property
    def method(self) -> str:
        return self.run["config"]["method"]

    @property
    def windows_per_step(self) -> int:
        """Of one process; runs that are compared had one."""
        return self.run["config"]["batch_size"] * self.run["config"]["gradient_accumulation"]

    @property
    def share(self) -> float:
        """Trained numbers, head included, in percent of the backbone's."""
        return 100 * self.run["parameters"]["trained"] / self.run["parameters"]["backbone"]


def read_results(paths: list[Path]) -> list[Result]:
    """All finished runs under the given directories, by method and name.

    Raises:
        InputError: there are none.
    """
    files = sorted({file for path in paths for file in path.rglob(RUN_FILE)})
    results = []
    for file in files:
        run = records.read_json(file)
        if run.get("status") != "finished":
            continue
        evaluation = file.with_name("evaluation.json")
        results.append(Result(file.parent.name, run, records.read_json(evaluation) if evaluation.is_file() else None))
    if not results:
        raise InputError(f"No finished run lies under {', '.join(map(str, paths))}.")
    order = list(METHODS)
    return sorted(results, key=lambda result: (order.index(result.method), result.name))


def results_table(results: list[Result]) -> str:
    """A Markdown table of runs: what was trained, what it reached on which questions, and how long it took.

    Where p-tuning-v2 and fine-tuning were both evaluated, a sentence sets their means over seeds side by side.
    """
    head = "| run | method | trained numbers | of the backbone | stored | windows seen | minutes | EM | F1 | questions |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for result in results:
        parameters = result.run["parameters"]
        if result.evaluation:
            exact, f1 = (_with_interval(result.evaluation[name]) for name in ("exact_match", "f1"))
            questions = f"{result.evaluation['n']:,} of {result.evaluation['data']}"
        else:
            exact, f1 = (f"{result.run['metrics'][name]:.1f}" for name in ("held_out_exact_match", "held_out_f1"))
            questions = f"{result.run['data']['held_out']['questions']:,} held out of training"
        lines.append(
            f"| {result.name} | {METHODS[result.method].title} | {parameters['trained']:,} | {result.share:.3g} % "
            f"| {_bytes(parameters['stored_bytes'])} | {result.run['steps'] * result.windows_per_step:,} "
            f"| {result.run['wall_seconds'] / 60:.1f} | {exact} | {f1} | {questions} |"
        )
    return "\n".join(lines + _against_fine_tuning(results))


def _against_fine_tuning(results: list[Result]) -> list[str]:
    """One sentence on how near the prefix comes, in a paragraph of its own; none if one of the two is missing."""
    evaluated = [result for result in results if result.evaluation]
    data = {r.evaluation["data"] for r in evaluated if r.method == "fine-tuning"}  # means over different questions would say nothing
    prefix, full = (
        [r.evaluation["f1"]["value"] for r in evaluated if r.method == method and data == {r.evaluation["data"]}]
        for method in ("p-tuning-v2", "fine-tuning")
    )
    if not prefix or not full:
        return []
    mean, of = sum(prefix) / len(prefix), sum(full) / len(full)
    seeds = f" over {len(prefix)} seeds ({min(prefix):.1f} to {max(prefix):.1f})" if len(prefix) > 1 else ""
    return ["", f"P-tuning v2: mean F1 {mean:.1f}{seeds}, {100 * mean / of:.1f} % of full fine-tuning's {of:.1f}."]


def put_into(file: Path, table: str) -> None:
    """Replace what stands between <!-- results --> and <!-- /results --> of a Markdown file by a table.

    Raises:
        InputError: the file lacks these two marks.
    """
    before, opening, rest = file.read_text(encoding="utf-8").partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not closing:
        raise InputError(f"{file} lacks the marks {OPENING} and {CLOSING}; put them where the table shall stand.")
    file.write_text(f"{before}{opening}\n\n{table}\n\n{closing}{after}", encoding="utf-8")


def _with_interval(value: dict) -> str:
    return f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


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


def draw_comparison(results: list[Result], path: Path) -> None:
    """Two panels, as SVG and PNG: F1 against trained numbers, and F1 on held-out questions along the training.

    Args:
        path: of the figure; both formats are written beside each other under its name.
    """
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
