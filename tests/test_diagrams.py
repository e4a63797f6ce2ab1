"""The explanatory drawings: they show what came in, to scale, and nothing is clipped or overlaps."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import nn

from ptv2.diagrams import (
    FROZEN,
    PREFIX,
    PROMPT,
    Step,
    draw_differences,
    draw_layer,
    draw_mask,
    draw_parameter_counts,
    draw_prompt_and_prefix,
    draw_steps,
    trace,
)
from ptv2.prefix import AttentionShape, PrefixConfig, PrefixEncoder

SMALL = AttentionShape(num_layers=6, num_heads=12, head_dim=32, hidden_size=384)
LARGE = AttentionShape(num_layers=24, num_heads=16, head_dim=64, hidden_size=1024)
TOKENS = [["[CLS]", "who", "?", "[SEP]"], ["[CLS]", "[SEP]", "[PAD]", "[PAD]"]]
MASK = torch.ones(2, 1, 4, 6, dtype=torch.bool)  # B = 2, S = 4, P = 2
MASK[1, :, :, 4:] = False


def chain() -> list[Step]:
    B, P, L, H, D = 3, 5, 2, 4, 8
    rows = torch.arange(B * P * 2 * L * H * D).view(B, P, -1)
    split = rows.view(B, P, 2 * L, H, D)
    turned = split.permute(2, 0, 3, 1, 4)
    named = [
        ("rows", "B P 2·L·E", rows), ("view", "B P 2L H D", split), ("permute", "2L B H P D", turned),
        ("split", "K,V B H P D", turned.split(2)[1]), ("key", "B H P D", turned[2]), ("copy", "B H P D", turned[2].contiguous()),
    ]  # fmt: skip
    return trace(named)


DRAWINGS = {
    "prompt and prefix": lambda: draw_prompt_and_prefix(SMALL, 16),
    "prompt and prefix, large": lambda: draw_prompt_and_prefix(LARGE, 128),
    "layer": lambda: draw_layer(SMALL, 16, 40),
    "layer, large": lambda: draw_layer(LARGE, 128, 256),
    "steps": lambda: draw_steps(chain()),
    "mask": lambda: draw_mask(MASK, 2, TOKENS),
    "counts": lambda: draw_parameter_counts({"small": SMALL, "large": LARGE}, 512, [2**i for i in range(11)]),
    "differences": lambda: draw_differences([("equal", 0.0, 0), ("rounding", 2e-5, 0), ("wrong", 14.0, 11)], 12),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def boxes(axes, colour: str) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == colour.lower()]


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_is_clipped_or_covers_another(name, monkeypatch):
    figure, drawn, draw = DRAWINGS[name](), [], Text.draw  # labels of ticks out of sight exist and are never drawn

    def note(text, *args, **kwargs):
        drawn.append(text)
        return draw(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", note)
    figure.canvas.draw()
    places = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text()]
    assert places
    whole = figure.bbox
    for text, place in places:
        assert place.x0 >= whole.x0 and place.x1 <= whole.x1 and place.y0 >= whole.y0 and place.y1 <= whole.y1, f"{text!r} is clipped"
    for i, (text, place) in enumerate(places):
        for other, there in places[:i]:
            apart = place.x1 <= there.x0 + 1 or there.x1 <= place.x0 + 1 or place.y1 <= there.y0 + 2 or there.y1 <= place.y0 + 2
            assert apart, f"{text!r} covers {other!r}"


def test_a_prompt_is_trained_at_the_input_and_a_prefix_in_every_layer():
    left, right = draw_prompt_and_prefix(SMALL, 16).axes
    L = SMALL.num_layers
    assert (len(boxes(left, PROMPT)), len(boxes(left, PREFIX)), len(boxes(left, FROZEN))) == (3, 0, 3 * L + 4 * (L + 1))
    assert (len(boxes(right, PROMPT)), len(boxes(right, PREFIX)), len(boxes(right, FROZEN))) == (0, 3 * 2 * L, 4 * (L + 1))
    prefix = sum(parameter.numel() for parameter in PrefixEncoder(PrefixConfig(16), SMALL).parameters())
    prompt = nn.Embedding(16, SMALL.hidden_size).weight.numel()
    assert f"= {prompt:,} trained numbers" in left.get_title()
    assert f"= {prefix:,} trained numbers" in right.get_title()


@pytest.mark.parametrize(("P", "S"), [(16, 40), (1, 7), (64, 64)])
def test_lengths_in_a_layer_are_to_scale(P, S):
    figure = draw_layer(SMALL, P, S)
    key, value, weights = boxes(figure.axes[0], PREFIX)
    text = next(box for box in boxes(figure.axes[0], FROZEN) if box.get_x() == key.get_x())
    for prefix in (key, value):
        assert prefix.get_height() / text.get_height() == pytest.approx(P / S)
    of_text = next(box for box in boxes(figure.axes[0], FROZEN) if box.get_x() == pytest.approx(weights.get_x() + weights.get_width()))
    assert weights.get_width() / of_text.get_width() == pytest.approx(P / S)
    assert f"weights = softmax(QKᵀ/√D + mask)\n[H, S, P+S] = 12·{S}·{P + S}" in texts(figure)


def test_a_trace_tells_shapes_strides_and_who_shares_memory():
    steps = chain()
    assert steps[2] == Step("permute", ("2L", "B", "H", "P", "D"), (4, 3, 4, 5, 8), (32, 640, 8, 128, 1), True)
    assert steps[-1] == Step("copy", ("B", "H", "P", "D"), (3, 4, 5, 8), (160, 40, 8, 1), False)
    assert [step.shared for step in steps] == [False, True, True, True, True, False]


def test_steps_show_every_axis_and_follow_it():
    figure = draw_steps(chain())
    shown = texts(figure)
    for step in chain():
        for name, length, stride in zip(step.axes, step.shape, step.strides, strict=True):
            assert f"{name} = {length}\nstride {stride}" in shown
    assert (shown.count("same memory"), shown.count("copied")) == (4, 1)
    # 2·L·E goes on into three axes; K,V ends where key and value part.
    assert len(figure.axes[0].lines) == (2 + 3) + 5 + 5 + 4 + 4


def test_a_mask_is_drawn_cell_by_cell():
    figure = draw_mask(MASK, 2, TOKENS)
    for axes, words, hidden in zip(figure.axes, TOKENS, (0, 2), strict=True):
        drawn = np.asarray(axes.collections[0].get_array()).reshape(4, 6)
        assert (drawn == [2, 2] + [1] * (4 - hidden) + [0] * hidden).all()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["prefix 0", "prefix 1", *words]
        assert [label.get_text() for label in axes.get_yticklabels()] == words
        assert axes.yaxis_inverted()  # the first query on top, as text is read


def test_the_curves_are_counts_of_modules():
    lengths = [1, 16, 64]
    figure = draw_parameter_counts({"small": SMALL}, 32, lengths)
    for line, projection in zip(figure.axes[0].lines, (False, True), strict=True):
        encoders = [PrefixEncoder(PrefixConfig(P, projection, 32), SMALL) for P in lengths]
        assert line.get_ydata().tolist() == [sum(p.numel() for p in encoder.parameters()) for encoder in encoders]
        assert list(line.get_xdata()) == lengths


def test_differences_stand_at_their_values_and_say_what_changes():
    figure = draw_differences([("same", 0.0, 0), ("rounding", 2e-5, 0), ("wrong", 14.0, 11)], 12)
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [1e-7, 2e-5, 14.0]
    assert [text for text in texts(figure) if "answer" in text or text == "equal"] == [
        "equal",
        "no answer changes",
        "11 of 12 answers change",
    ]
    assert dots[0].get_color() == dots[1].get_color() != dots[2].get_color()
