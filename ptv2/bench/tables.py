"""What a benchmark found, for people: Markdown tables, and plots, from its record alone."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ptv2 import records
from ptv2.plots import STYLE, label_ends, save
from ptv2.report import markdown_table, put_into

OURS, PEER, FULL = "#0072B2", "#737373", "#D55E00"  # Okabe and Ito's


def table(record: dict) -> str:
    """The record as Markdown."""
    return "\n\n".join(write(record) for write in _FORMS[kind(record)][0].values())


def _spread(values: dict[str, float], digits: int = 1) -> str:
    return f"{values['median']:.{digits}f} [{values['min']:.{digits}f}, {values['max']:.{digits}f}]"


def _train_table(record: dict) -> str:
    ours = list(record["ratios"])
    titles = {name: method["title"] for name, method in record["methods"].items()}
    head = ["training", "examples/s", "tokens/s", "memory, MiB", *(f"{titles[name]} is so many times as fast" for name in ours)]
    rows = [
        [
            method["title"],
            _spread(method["examples_per_second"]),
            f"{method['tokens_per_second']['median']:,.0f}",
            f"{method['memory_mib']:,.0f}",
            *("" if other == name else _spread(record["ratios"][name][other], 2) for name in ours),
        ]
        for other, method in record["methods"].items()
    ]
    return markdown_table(head, rows)


def _limits_table(record: dict) -> str:
    rows = [
        [
            record["methods"][name]["title"],
            f"{limit['product_rate']['median'] / 1e9:,.0f}",
            f"{100 * limit['share']['median']:.0f} % [{100 * limit['share']['min']:.0f}, {100 * limit['share']['max']:.0f}]",
            ", ".join(f"{group} {100 * share:.0f} %" for group, share in limit["profile"].items() if share >= 0.01),
        ]
        for name, limit in record["limits"].items()
    ]
    return markdown_table(["", "matrix products, GFLOP/s", "share of the limit reached", "where the step's time goes"], rows)


def _aims_table(record: dict) -> str:
    """What was aimed at for two AVX-512 cores, batches of 32 and a prefix of 16, and what was measured."""
    ratios, limits, methods = record["ratios"], record["limits"], record["methods"]
    best = max((n for n in methods if n.startswith("peft")), key=lambda n: methods[n]["examples_per_second"]["median"], default=None)
    compared = (("peft-fp32", "", 5.0), (best, ", the fastest of PEFT here", 3.5), ("peft-padded", "", 12.0))
    rows = [
        [f"times as fast as {methods[peer]['title']}{note}", aim, *(f"{ratios[name][peer]['median']:.1f}" for name in ratios)]
        for peer, note, aim in compared
        if peer in methods
    ]
    shares = {"ptv2-fp32": "70 %", "ptv2-bf16": "50 %"}
    aimed = ", ".join(f"{share} in {name.removeprefix('ptv2-')}" for name, share in shares.items())
    rows.append(["share of the limit reached", aimed, *(f"{100 * limits[name]['share']['median']:.0f} %" for name in ratios)])
    if "full-fp32" in methods:
        full = methods["full-fp32"]["memory_mib"]
        rows.append(["memory, of full fine-tuning's", "at most 50 %", *(f"{100 * methods[n]['memory_mib'] / full:.0f} %" for n in ratios)])
    return markdown_table(["", "aim", *(methods[name]["title"] for name in ratios)], rows)


def _answer_table(record: dict) -> str:
    head = ["answering", "windows/s", "of the plain backbone", "one question, ms: p50", "p95", "memory, MiB"]
    rows = [
        [
            method["title"],
            _spread(method["windows_per_second"]),
            _spread(method["of_plain"], 2),
            f"{method['latency_ms']['p50']:.1f}",
            f"{method['latency_ms']['p95']:.1f}",
            f"{method['memory_mib']:,.0f}",
        ]
        for method in record["methods"].values()
    ]
    return markdown_table(head, rows)


def _scale_table(record: dict) -> str:
    tables = []
    for quantity, points in record["curves"].items():
        rows = [[f"{p['value']:,}", p["name"], _spread(p["seconds"], 3), f"{p['memory_mib']:,.0f}"] for p in points]
        tables.append(markdown_table([quantity, "", "seconds", "memory, MiB"], rows))
    return "\n\n".join(tables)


def _accuracy_table(record: dict) -> str:
    head = ["method", "minutes", "windows", "F1 at the end", "so many times sooner at PEFT's last F1"]
    rows = []
    for name, method in record["methods"].items():
        last, times = method["curve"][-1], record["sooner"].get(name)
        ratio = "" if name == "peft" else "never" if times is None else f"{times:.1f}"
        rows.append([method["title"], f"{last['minutes']:.1f}", f"{last['windows']:,.0f}", f"{last['f1']:.1f}", ratio])
    return markdown_table(head, rows)


def _leads_table(record: dict) -> str:
    rows = [[lead["lead"], lead["at"], _spread(lead["times_as_fast"], 2)] for lead in record["leads"]]
    tables = markdown_table(["lead", "at", "times as fast as now"], rows)
    step, batch = record["step_seconds"]["median"], record["batch_seconds"]["median"]
    int8 = record["int8"]
    parts = [
        f"Compiling the encoder took {record['compilation_seconds']:.0f} s.",
        f"Padding is {100 * record['padding']:.1f} % of the tokens in an epoch's batches.",
        f"Making a batch takes {1000 * batch:.1f} ms, {100 * batch / step:.1f} % of a step.",
        f"With 8-bit products the loss of an untrained model is {int8['loss']:.4f} where float32 gives {int8['exact_loss']:.4f},",
        f"and the prefix's gradient has a cosine of {int8['gradient_cosine']:.3f} with float32's.",
    ]
    return f"{tables}\n\n{' '.join(parts)}"


def _colour(name: str) -> str:
    return OURS if name.startswith("ptv2") else FULL if name.startswith("full") else PEER


def draw_train(record: dict) -> Figure:
    """Examples per second of every contender, with the range over the rounds."""
    methods = {name: (m["title"], m["examples_per_second"]) for name, m in record["methods"].items()}
    return _bars(methods, "training examples per second (bar: median, line: short to long texts)")


def draw_answer(record: dict) -> Figure:
    """Windows per second of every contender, with the range over the rounds."""
    methods = {name: (m["title"], m["windows_per_second"]) for name, m in record["methods"].items()}
    return _bars(methods, "windows answered per second (bar: median, line: range)")


def _bars(methods: dict[str, tuple[str, dict]], label: str, digits: int = 1) -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.42 * len(methods)), layout="constrained")
        longest = max(values["max"] for _, values in methods.values())
        for place, (name, (_, values)) in enumerate(methods.items()):
            axes.barh(place, values["median"], color=_colour(name), height=0.66)
            axes.plot([values["min"], values["max"]], [place, place], color="black", linewidth=1.2)
            axes.text(values["max"] + 0.012 * longest, place, f"{values['median']:.{digits}f}", va="center")
        axes.set_yticks(range(len(methods)), [title for title, _ in methods.values()])
        axes.set_xlim(0, 1.1 * longest)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        figure.supxlabel(label, fontsize=10)  # centred below the names, too, for it may be wider than the axes
    return figure


def draw_scale(record: dict) -> Figure:
    """Time above, memory below, one column for each quantity."""
    curves = record["curves"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, len(curves), figsize=(3.3 * len(curves), 5.6), layout="constrained", squeeze=False)
        for (quantity, points), (upper, lower) in zip(curves.items(), panels.T, strict=True):
            for name in dict.fromkeys(point["name"] for point in points):
                mine = [point for point in points if point["name"] == name]
                values = [point["value"] for point in mine]
                colour = _colour("ptv2" if name == "data" else name)
                upper.plot(values, [point["seconds"]["median"] for point in mine], marker="o", markersize=4, color=colour)
                spans = [[point["seconds"][end] for point in mine] for end in ("min", "max")]
                upper.fill_between(values, *spans, color=colour, alpha=0.2, linewidth=0)
                lower.plot(values, [point["memory_mib"] for point in mine], marker="o", markersize=4, color=colour)
            upper.set_title("one pass over the data" if quantity == "questions" else "one training step", fontsize=10, loc="left")
            upper.set_ylim(bottom=0)
            memory = [point["memory_mib"] for point in points]
            lower.set_ylim(min(0, 1.2 * min(memory)), max(50, 1.05 * max(memory)))  # reading data may end below where it began
            for axes in (upper, lower):
                axes.set_xlim(left=0)
            lower.set_xlabel(quantity)
        panels[0, 0].set_ylabel("seconds")
        panels[1, 0].set_ylabel("memory above the start's, MiB")
        for line, text, above in zip(panels[0, 0].lines, ("ptv2, fp32", "full fine-tuning, fp32"), (True, False), strict=False):
            x, y = line.get_xydata()[-1]
            offset = {"xytext": (0, 8 if above else -10), "textcoords": "offset points"}
            panels[0, 0].annotate(text, (x, y), **offset, color=line.get_color(), ha="right", va="bottom" if above else "top")
    return figure


def draw_accuracy(record: dict) -> Figure:
    """F1 on held-out articles against minutes of training."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
        for name, method in record["methods"].items():
            minutes, f1 = ([point[what] for point in method["curve"]] for what in ("minutes", "f1"))
            dashes = "--" if name.endswith("int8") else "-"
            axes.plot(minutes, f1, marker="o", markersize=4, color=_colour(name), linestyle=dashes)
        axes.set_xlim(0, 1.32 * max(m["curve"][-1]["minutes"] for m in record["methods"].values()))
        axes.set_ylim(bottom=0)
        last = {name: method["curve"][-1] for name, method in record["methods"].items()}
        label_ends(axes, [(m["title"], last[name]["minutes"], last[name]["f1"], _colour(name)) for name, m in record["methods"].items()])
        axes.set_xlabel("minutes of training, each method alone on the same cores in turn")
        axes.set_ylabel("F1 on held-out training articles, %")
    return figure


def draw_leads(record: dict) -> Figure:
    """How many times as fast each lead is as what is done now."""
    rows = {f"{lead['lead']} ({lead['at']})": ("", lead["times_as_fast"]) for lead in record["leads"]}
    figure = _bars({name: (name, values) for name, (_, values) in rows.items()}, "times as fast as now (line: range)", 2)
    figure.axes[0].axvline(1, color="#999999", linestyle="--", linewidth=1, zorder=0)
    return figure


_FORMS = {  # the part of a record that tells which benchmark wrote it -> its tables by name, and its figure
    "limits": ({"": _train_table, " limits": _limits_table, " aims": _aims_table}, draw_train),
    "curves": ({"": _scale_table}, draw_scale),
    "sooner": ({"": _accuracy_table}, draw_accuracy),
    "leads": ({"": _leads_table}, draw_leads),
    "windows": ({"": _answer_table}, draw_answer),
}


def kind(record: dict) -> str:
    """Which part of a record tells what it is."""
    return next(part for part in _FORMS if part in record)


def draw(record: dict, path: Path) -> None:
    """The record as a figure, SVG and PNG beside each other under this name."""
    save(_FORMS[kind(record)][1](record), path)


def report(folder: Path, files: list[Path]) -> None:
    """Draw every record of a folder beside it, and put its tables into the files that have a place for them.

    Args:
        files: of Markdown; the places of train.json are between <!-- speed: train --> and <!-- /speed: train -->, and the same
            with "train limits" and "train aims".
    """
    for file in sorted(folder.glob("*.json")):
        record = records.read_json(file)
        draw(record, file.with_suffix(""))
        for name, write in _FORMS[kind(record)][0].items():
            opening, closing = f"<!-- speed: {file.stem}{name} -->", f"<!-- /speed: {file.stem}{name} -->"
            for text in files:
                if opening in text.read_text(encoding="utf-8"):
                    put_into(text, write(record), opening, closing)
