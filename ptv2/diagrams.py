"""Explanatory drawings: where a prefix enters a transformer, how its tensor is cut, what its mask shows and what it costs.

Symbols B S P L H D E as in `ptv2.prefix`. Every function returns a matplotlib figure; `ptv2.plots.show` displays and keeps
it. Lengths, shapes, strides and masks are those of the tensors and configs that come in.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from torch import Tensor

from ptv2.plots import COLOURS, STYLE
from ptv2.prefix import AttentionShape, PrefixConfig, prefix_parameter_count

PREFIX, PROMPT, FROZEN, INK = COLOURS["p-tuning-v2"], COLOURS["prompt-tuning"], "#d9d9d9", "#333333"
# What an axis is made of, so that a drawing can follow it through a split or a permutation; other axes are made of themselves.
_PARTS = {"2·L·E": {"2L", "H", "D"}, "K,V": {"2L"}}
_AXIS_COLOURS = {"B": "#E69F00", "P": "#56B4E9", "2L": "#66C2A5", "K,V": "#66C2A5", "H": "#E5A5CB", "D": "#F0E442"}


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of so many inches with one empty panel in the given coordinates."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = FROZEN) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    ink = "white" if colour in (PREFIX, PROMPT) else INK
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, style: str = "-|>") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=9, color=colour, linewidth=1, shrinkA=1, shrinkB=1))


def draw_prompt_and_prefix(shape: AttentionShape, prefix_length: int) -> Figure:
    """Prompt tuning beside P-tuning v2: which vectors are trained, layer by layer.

    All L layers are drawn, with three of the P trained positions and four of the text's.
    """
    L, P, E = shape.num_layers, prefix_length, shape.hidden_size
    prefix = prefix_parameter_count(PrefixConfig(prefix_length=P), shape)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10, 0.5 * L + 1.9), layout="constrained")
    titles = (
        f"Prompt tuning: vectors at the input\nP·E = {P}·{E} = {P * E:,} trained numbers",
        f"P-tuning v2: keys and values in every layer\nP·2·L·E = {P}·2·{L}·{E} = {prefix:,} trained numbers",
    )
    for axes, title, deep in zip(panels, titles, (False, True), strict=True):
        axes.axis("off")
        axes.set(xlim=(-1.5, 7.6), ylim=(-0.9, L + 0.7))
        axes.set_title(title, fontsize=11, color=PREFIX if deep else PROMPT)
        for row in range(L + 1):
            axes.text(-0.3, row + 0.3, "input" if row == 0 else f"layer {row - 1}", ha="right", va="center", fontsize=9, color=INK)
            _draw_positions(axes, row, deep)
        for x, count, name in ((0, 3, f"P = {P} positions"), (3.6, 4, "S text tokens")):
            axes.plot([x, x + count - 0.2], [-0.2, -0.2], color=INK, linewidth=1)
            axes.text(x + (count - 0.2) / 2, -0.32, name, ha="center", va="top", fontsize=9, color=INK)
    legend = {"trained vector": PROMPT, "trained key K and value V": PREFIX, "computed by frozen weights": FROZEN}
    patches = [Patch(facecolor=colour, edgecolor=INK, label=name) for name, colour in legend.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_positions(axes: Axes, row: int, deep: bool) -> None:
    """A row of `draw_prompt_and_prefix`: the input (0) or a layer, at three trained positions and four of the text."""
    for i in range(3):
        if deep and row > 0:
            _box(axes, i, row, 0.4, 0.6, "K", PREFIX)
            _box(axes, i + 0.4, row, 0.4, 0.6, "V", PREFIX)
        elif not deep:
            _box(axes, i, row, 0.8, 0.6, colour=FROZEN if row else PROMPT)
            if row:
                _arrow(axes, (i + 0.4, row - 0.4), (i + 0.4, row))
    for i in range(4):
        _box(axes, 3.6 + i, row, 0.8, 0.6)
        if row:
            _arrow(axes, (4 + i, row - 0.4), (4 + i, row))
    if row:  # attention: the text reads what stands on the left; a prompt, being computed, reads the text as well
        colour, style = (PREFIX, "-|>") if deep else (INK, "<|-|>")
        _arrow(axes, (2.8, row + 0.3), (3.6, row + 0.3), colour, style)


def draw_layer(shape: AttentionShape, prefix_length: int, text_length: int) -> Figure:
    """Inside one attention layer: the prefix stands before the text's keys and values; queries are the text's alone.

    Lengths P and S are to scale.
    """
    H, D, E, P, S = shape.num_heads, shape.head_dim, shape.hidden_size, prefix_length, text_length
    p, s = 3 * P / (P + S), 3 * S / (P + S)  # in units of the drawing
    figure, axes = _canvas(10, 6.2, (-0.1, 15.3), (-0.5, 11.0))
    _box(axes, 0, 5.1 - s / 2, 1.1, s, f"text\n[S, E]\n{S}·{E}")
    for name, bottom in (("Q", 7.6), ("K", 3.9), ("V", 0.2)):
        middle = bottom + s / 2
        _arrow(axes, (1.1, 5.1), (2.1, middle))
        _box(axes, 2.1, middle - 0.35, 0.8, 0.7, f"$W_{name}$")
        _arrow(axes, (2.9, middle), (4.9, middle))
        _box(axes, 4.9, bottom, 1.5, s, f"{name}\n[H, S, D]\n{H}·{S}·{D}")
        if name != "Q":
            _box(axes, 4.9, bottom + s, 1.5, p, "", PREFIX)
            label = f"{'keys' if name == 'K' else 'values'} of the prefix\n[H, P, D] = {H}·{P}·{D}"
            axes.text(4.8, bottom + s + p / 2, label, ha="right", va="center", fontsize=9, color=PREFIX)
    top, scores, out = 7.6 + s / 2, (8.2, 7.6), 12.2
    _box(axes, scores[0], scores[1], p, s, "", PREFIX)
    _box(axes, scores[0] + p, scores[1], s, s, "on the text")
    axes.text(scores[0] + p / 2, top, "on the prefix", rotation=90, ha="center", va="center", fontsize=9, color="white")
    title = f"weights = softmax(QKᵀ/√D + mask)\n[H, S, P+S] = {H}·{S}·{P + S}"
    axes.text(scores[0] + 1.5, scores[1] + s + 0.15, title, ha="center", va="bottom", fontsize=9, color=INK)
    _arrow(axes, (6.4, top), (scores[0], top))
    _arrow(axes, (6.4, 3.9 + 1.5), (scores[0] + p + s / 2, scores[1]))
    _box(axes, out, 5.1 - s / 2, 1.5, s, f"weights·V\n[H, S, D]\n{H}·{S}·{D}")
    _arrow(axes, (scores[0] + 3, top), (out, 5.1 + s / 4))
    _arrow(axes, (6.4, 0.2 + 1.5), (out, 5.1 - s / 4))
    _arrow(axes, (out + 1.5, 5.1), (out + 2.1, 5.1))
    _box(axes, out + 2.1, 4.75, 0.8, 0.7, "$W_O$")
    return figure


@dataclass(frozen=True)
class Step:
    """A tensor after one operation of a chain.

    Args:
        operation: what made it, as it is written in code.
        axes: the names of its axes, such as ("B", "P", "2·L·E").
        shape, strides: its own, in elements.
        shared: whether it lies in the memory of the step before.
    """

    operation: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    shared: bool


def trace(chain: Iterable[tuple[str, str, Tensor]]) -> list[Step]:
    """The steps of a chain of (operation, names of the axes, tensor), the names parted by spaces."""
    steps, before = [], None
    for operation, axes, tensor in chain:
        memory = tensor.untyped_storage().data_ptr()
        steps.append(Step(operation, tuple(axes.split()), tuple(tensor.shape), tensor.stride(), memory == before))
        before = memory
    return steps


def draw_steps(steps: list[Step]) -> Figure:
    """A tensor on its way, one step a row: each axis with its length and stride, followed by lines into the next step."""
    figure, axes = _canvas(10, 1.05 * len(steps) + 0.3, (-4.6, 12.4), (-1.5 * len(steps) + 0.5, 1.2))
    before: list[tuple[str, float]] = []
    for i, step in enumerate(steps):
        y = -1.5 * i
        axes.text(-0.3, y + 0.38, step.operation, ha="right", va="center", fontsize=9, color=INK, family="monospace")
        after, x = [], 0.0
        for name, length, stride in zip(step.axes, step.shape, step.strides, strict=True):
            width = 2.0 * len(_parts(name)) - 0.2
            _box(axes, x, y, width, 0.75, f"{name} = {length}\nstride {stride:,}", _AXIS_COLOURS.get(name, FROZEN))
            after.append((name, x + width / 2))
            x += width + 0.2
        for name, start in before:
            for other, end in after:
                if _parts(name) & _parts(other):
                    axes.plot([start, end], [y + 1.5, y + 0.75], color=INK, linewidth=0.8, zorder=0)
        note = "" if i == 0 else "same memory" if step.shared else "copied"
        axes.text(12.3, y + 0.38, note, ha="right", va="center", fontsize=9, color=INK if step.shared else COLOURS["fine-tuning"])
        before = after
    return figure


def _parts(axis: str) -> set[str]:
    return _PARTS.get(axis, {axis})


def draw_mask(mask: Tensor, prefix_length: int, tokens: list[list[str]]) -> Figure:
    """Which keys each query may see, one panel an example.

    Args:
        mask: bool [B, 1, S, P+S], True for visible, as transformers makes it for sdpa.
        prefix_length: P, the first keys.
        tokens: of each example, S of them.
    """
    P, (B, _, S, width) = prefix_length, mask.shape
    codes = mask[:, 0].int()  # 0 hidden, 1 text, 2 prefix
    codes[:, :, :P] *= 2
    names = [f"prefix {i}" for i in range(P)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, panels = plt.subplots(1, B, figsize=(10, 8.4 / B * S / width + 1.3), layout="constrained", squeeze=False)
        for axes, code, words in zip(panels[0], codes, tokens, strict=True):
            axes.pcolormesh(code.numpy(), cmap=ListedColormap(["white", "#a6a6a6", PREFIX]), vmin=0, vmax=2, edgecolors=INK, linewidth=0.4)
            axes.set(aspect="equal", xlabel="key")
            axes.invert_yaxis()
            axes.set_xticks([i + 0.5 for i in range(width)], names + words, rotation=90, fontsize=8)
            axes.set_yticks([i + 0.5 for i in range(S)], words, fontsize=8)
            axes.tick_params(length=0)
        panels[0][0].set_ylabel("query")
        legend = {"prefix, visible": PREFIX, "text, visible": "#a6a6a6", "padding, hidden": "white"}
        patches = [Patch(facecolor=colour, edgecolor=INK, label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_parameter_counts(shapes: dict[str, AttentionShape], hidden: int, lengths: list[int]) -> Figure:
    """Trained numbers against prefix length: the embedding, and the embedding with an MLP of width `hidden`."""
    colours = (COLOURS["p-tuning-v2"], COLOURS["fine-tuning"], COLOURS["lora"], COLOURS["bitfit"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        for (name, shape), colour in zip(shapes.items(), colours, strict=False):
            for projection, style in ((False, "-"), (True, "--")):
                counts = [prefix_parameter_count(PrefixConfig(P, projection, hidden), shape) for P in lengths]
                axes.plot(lengths, counts, style, color=colour)
                if projection:
                    axes.annotate(f"{name}, MLP", (lengths[0], counts[0]), xytext=(0, 5), textcoords="offset points", color=colour)
                else:
                    axes.annotate(name, (lengths[-1], counts[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center")
        axes.set(xscale="log", yscale="log", xlabel="prefix length P (log scale)", ylabel="trained numbers (log scale)")
        axes.set_xticks(lengths, [str(P) for P in lengths])
        axes.minorticks_off()
        axes.set_title(f"solid: embedding; dashed: embedding and an MLP of width {hidden}", fontsize=10, loc="left")
    return figure


def draw_differences(rows: list[tuple[str, float, int]], questions: int) -> Figure:
    """How far logits differ from the right ones, one row a way of computing them, on a log axis.

    Args:
        rows: name, largest absolute difference of a logit, and how many of the `questions` get another answer. What differs by
            more than rounding can explain has another colour.
    """
    floor = 1e-7  # about the rounding of a float32 near 1; equal to the last bit stands there, too
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.1), layout="constrained")
        for i, (_, difference, changed) in enumerate(rows):
            colour = COLOURS["fine-tuning"] if difference > 1e-3 else PREFIX
            x = max(difference, floor)
            axes.plot([floor, x], [i, i], color=colour, linewidth=1)
            axes.plot(x, i, "o", color=colour, markersize=6)
            note = f"{changed} of {questions} answers change" if changed else "equal" if difference == 0 else "no answer changes"
            axes.annotate(note, (x, i), xytext=(8, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
        axes.set(xscale="log", xlim=(floor / 2, 1e4), xlabel="largest difference of a logit (log scale)")
        axes.set_xticks([10.0**power for power in range(-7, 3)])
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure
