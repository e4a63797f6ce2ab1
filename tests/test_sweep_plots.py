"""Figures of sweeps: what is drawn is what the record says, also where it holds little."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from ptv2.errors import InputError
from ptv2.report import Result, few_shot_table, gains_table, sweep_table
from ptv2.sweep_plots import START_COLOURS, draw_depth, draw_few_shot, draw_how_soon, draw_length, draw_points, draw_search
from ptv2.sweep_scores import f1_over_seeds, join_by_start, trial_f1
from ptv2.tradeoff import draw_tradeoff


def trial(point: str, changes: dict, seed: int, f1: float, evaluated: bool = True, questions: int = 700) -> dict:
    interval = {"value": f1, "low": f1 - 2, "high": f1 + 3}
    return {
        "point": point, "changes": changes, "seed": seed, "held_out": {"exact_match": f1 / 2, "f1": f1}, "windows_seen": 2000,
        "evaluation": {"data": "xquad_en_v1.1.json.gz", "n": 10, "exact_match": interval, "f1": interval} if evaluated else None,
        "train_questions": questions, "curve": [[1000, f1 / 2], [2000, f1]], "parameters": {"trained": 10, "backbone": 1000},
    }  # fmt: skip


def record(trials: list[dict], method: str = "p-tuning-v2") -> dict:
    config = {"method": method, "train_data": ["../data/squadshifts_new_wiki_v1.0.json.gz"], "prefix": {"init": "activations"}}
    return {"config": {**config, "precision": "int8"}, "trials": trials, "provenances": [{"held_out": {"sha256": "a"}}]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(axes) -> list[tuple[list, list]]:
    """The lines that join something, markers aside."""
    joined = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in joined]


LENGTHS = [trial(f"prefix_length={P}", {"prefix.prefix_length": P}, seed, 10 + P + seed) for seed in (0, 1) for P in (16, 1, 4)]


def test_a_line_joins_the_means_over_seeds_and_each_run_is_a_dot():
    (axes,) = draw_length([record(LENGTHS)]).axes
    assert lines(axes) == [([1, 4, 16], [11.5, 14.5, 26.5])]
    dots = [container.lines[0] for container in axes.containers]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(P, 10 + P + s) for P in (1, 4, 16) for s in (0, 1)]
    at = [dot.get_transform().transform((4, 14))[0] for dot in dots]
    assert at[1] > at[0]  # seeds side by side
    assert axes.get_title(loc="left") == "2,000 windows of new_wiki, int8\n2 seeds a point"
    assert axes.get_ylabel() == "F1 on xquad_en, %" and axes.get_ylim()[0] == 0


def test_without_an_evaluation_the_held_out_questions_count_and_have_no_interval():
    few = [trial("prefix_length=2", {"prefix.prefix_length": 2}, 0, 7.0, evaluated=False)]
    full, small = draw_length([record(LENGTHS), record(few)]).axes
    assert (full.get_ylabel(), small.get_ylabel()) == ("F1 on xquad_en, %", "F1 on held-out questions, %")
    assert trial_f1(few[0]).low == trial_f1(few[0]).value == trial_f1(few[0]).high == 7.0
    assert small.get_title(loc="left").endswith("1 seed a point")


def test_the_depth_figure_sorts_runs_into_first_last_and_alone():
    def one(name, layers, f1):
        return trial(name, {"prefix.layers": layers} if layers else {}, 0, f1)

    runs = [
        one("all", None, 30),
        one("first 2", [0, 1], 10),
        one("last 2", [1, 2], 20),
        one("a", [0], 5),
        one("b", [1], 6),
        one("c", [2], 8),
    ]
    above, below = draw_depth([record(runs)], num_layers=3).axes
    assert lines(above) == [([1, 2, 3], [5, 10, 30]), ([1, 2, 3], [8, 20, 30])]
    assert lines(below) == [([0, 1, 2], [5, 6, 8])]
    assert {text.get_text() for text in above.texts} == {"first k", "last k"}


def test_points_have_a_row_each_by_name_and_the_numbers_in_it():
    runs = [trial(name, {}, seed, f1 + seed) for seed in (0, 1) for name, f1 in (("MLP, 10", 20), ("embedding", 30), ("MLP, 9", 10))]
    (axes,) = draw_points([record(runs)]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embedding", "MLP, 9", "MLP, 10"]
    assert lines(axes) == [([30.5, 30.5], [-0.3, 0.3]), ([10.5, 10.5], [0.7, 1.3]), ([20.5, 20.5], [1.7, 2.3])]
    assert axes.yaxis_inverted() or axes.get_ylim()[0] > axes.get_ylim()[1]


def test_a_search_has_a_panel_for_each_quantity_with_every_trial():
    changes = [{"learning_rate": 0.01 * (n + 1), "prefix.init": ("normal", "zero")[n % 2], "batch_size": 8} for n in range(6)]
    found = record([trial(f"trial {n}", each, 0, 10 + n, evaluated=False) for n, each in enumerate(changes)])
    rate, init, batch = [axes for axes in draw_search(found).axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in (rate, init, batch)] == ["learning rate", "init", "batch size"]
    assert rate.get_xscale() == "log" and init.get_xscale() == "linear"
    np.testing.assert_allclose(rate.lines[0].get_xydata(), [[0.01 * (n + 1), 10 + n] for n in range(6)])
    np.testing.assert_allclose(init.lines[0].get_xydata(), [[n % 2, 10 + n] for n in range(6)])
    assert [label.get_text() for label in init.get_xticklabels()] == ["normal", "zero"]


def test_initialisations_are_drawn_by_questions_and_along_the_training():
    runs = [
        trial(f"{n} {init}", {"prefix.init": init, "max_train_questions": n}, 0, f1 + n / 100, questions=n or 700)
        for n in (0, 32) for init, f1 in (("zero", 5), ("normal", 10))
    ]  # fmt: skip
    tuned = record([trial("32 plain", {"prefix.init": "activations"}, 0, 30, questions=32)], method="fine-tuning")
    joined = join_by_start([record(runs), tuned])
    (axes,) = draw_few_shot([joined]).axes
    assert lines(axes) == [([32, 700], [10.32, 10]), ([32, 700], [5.32, 5])]
    assert {text.get_text() for text in axes.texts} == {"zero", "normal", "full fine-tuning"}
    (axes,) = draw_how_soon([join_by_start([record(runs)])]).axes
    assert lines(axes) == [([1000, 2000], [5, 10]), ([1000, 2000], [2.5, 5])]  # of the runs on all questions
    assert [text.get_text() for text in axes.texts] == ["zero", "normal"]  # from below


def test_starts_with_several_seeds_are_drawn_as_means_with_the_range_of_the_seeds():
    runs = [trial(f"{n}", {"prefix.init": "zero"}, seed, f1 + n / 100, questions=n) for n in (32, 7505) for seed, f1 in ((0, 10), (1, 14))]
    joined = join_by_start([record(runs)])
    assert list(f1_over_seeds(joined)) == ["zero, 32 questions", "zero, 7,505 questions"]  # by their value, commas or not
    (axes,) = draw_few_shot([joined]).axes
    assert lines(axes) == [([32, 7505], [12.32, 87.05])]
    (bars,) = axes.containers[0].lines[2]
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[10.32, 14.32], [85.05, 89.05]])
    (axes,) = draw_how_soon([joined]).axes
    assert lines(axes) == [([1000, 2000], [43.525, 87.05])]
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(1000, 42.525), (1000, 44.525), (2000, 85.05), (2000, 89.05)}


def test_starts_have_names_that_tell_methods_and_checkpoints_apart():
    inits = ["normal", "runs/pretraining/cloze-seed-0"]
    ours, full = (
        record([trial(init, {"prefix.init": init}, 0, 10, questions=32) for init in inits], method=method)
        for method in ("p-tuning-v2", "fine-tuning")
    )
    joined = join_by_start([ours, full])
    assert [each["start"] for each in joined["trials"]] == [
        "normal", "pretrained: cloze", "full fine-tuning", "full fine-tuning, pretrained",
    ]  # fmt: skip
    assert {each["start"] for each in joined["trials"]} <= set(START_COLOURS)


def test_the_few_shot_table_has_a_row_a_start_and_a_column_a_number_of_questions():
    runs = [
        trial("", {"prefix.init": "zero"}, 0, 10.0, questions=32),
        trial("", {"prefix.init": "zero"}, 1, 13.0, questions=32),
        trial("", {"prefix.init": "zero"}, 0, 20.0, questions=7000),
        trial("", {"prefix.init": "normal"}, 0, 5.0, questions=7000, evaluated=False),
    ]
    assert few_shot_table(join_by_start([record(runs)])).splitlines() == [
        "| start | 32 questions | 7,000 questions |", "| --- | --: | --: |",
        "| zero | 11.5 [10.0, 13.0] | 20.0 [18.0, 23.0] |", "| normal |  | 5.0 |",
    ]  # fmt: skip


def test_the_trade_off_has_runs_filled_small_runs_hollow_and_published_systems_as_lines():
    run = {
        "config": {"method": "fine-tuning", "batch_size": 8, "gradient_accumulation": 1}, "steps": 100,
        "parameters": {"trained": 1000, "backbone": 1000},
    }  # fmt: skip
    full = Result("full", run, {"f1": {"value": 66.0, "low": 64.0, "high": 68.0}})
    small = record([trial(f"method={method}", {"method": method}, 0, f1) for method, f1 in (("lora", 20), ("fine-tuning", 30))])
    systems = {name: {"f1": {"value": f1}} for name, f1 in (("BERT (Google)", 86.0), ("r-net (MSR)", 85.0), ("Baseline (SU)", 46.0))}
    (axes,) = draw_tradeoff([full], small, {"data": "xquad_en_v1.1.json.gz", "systems": systems}).axes
    faces = {(container.lines[0].get_xdata()[0], container.lines[0].get_markerfacecolor()) for container in axes.containers}
    assert faces == {(1.0, "white"), (100.0, "#D55E00")}
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == [46.0, 85.0, 86.0]
    assert {"LoRA", "full fine-tuning", "Baseline", "r-net, BERT"} == {text.get_text() for text in axes.texts}
    assert np.log10(axes.get_xlim()[1]) > 2 and axes.get_ylim() == (0, 100)
    draw_tradeoff([full], None, {"data": "xquad_en_v1.1.json.gz", "systems": systems})  # without the small runs


def test_the_table_has_means_and_what_is_known_of_their_spread():
    runs = [trial("twice", {}, 0, 10.0), trial("once", {}, 0, 20.0), trial("twice", {}, 1, 13.0)]
    for each in runs:
        each["held_out"]["f1"] += 1
    assert sweep_table(record(runs)).splitlines() == [
        "| point | trained numbers | seeds | F1 on xquad_en, % | F1 on held-out articles, % |", "| --- | --: | --: | --: | --: |",
        "| once | 10 | 1 | 20.0 [18.0, 23.0] | 21.0 |", "| twice | 10 | 2 | 11.5 [10.0, 13.0] | 12.5 [11.0, 14.0] |",
    ]  # fmt: skip
    made = record(runs)
    made["provenances"].append({"held_out": {"sha256": "b"}})  # each objective of pretraining makes its own questions
    assert sweep_table(made).splitlines()[0] == "| point | trained numbers | seeds | F1 on xquad_en, % |"
    held_out = [trial("held out", {}, 0, 5.0, evaluated=False)]
    assert sweep_table(record(held_out)).splitlines()[0::2] == [
        "| point | trained numbers | seeds | F1 on held-out articles, % |", "| held out | 10 | 1 | 5.0 |",
    ]  # fmt: skip


def test_points_are_compared_with_runs_of_the_same_seed():
    runs = [trial("plain", {}, seed, 30 + 5 * seed) for seed in (0, 1, 2)]
    runs += [trial("other", {"weight_decay": 0.1}, seed, 31 + 5 * seed - 3 * (seed == 1)) for seed in (1, 0, 3)]  # seed 2 is not there
    table = gains_table(record(runs), "plain").splitlines()
    assert table[0].startswith("| beside plain | F1 on held-out articles, points more | seeds ahead | F1 on xquad_en, points more |")
    assert table[2:] == ["| other | -0.5 [-2.0, +1.0] | 1 of 2 | -0.5 [-2.0, +1.0] | 1 of 2 |"]
    without = [{**run, "evaluation": None} for run in runs]
    assert gains_table(record(without), "plain").splitlines()[2:] == ["| other | -0.5 [-2.0, +1.0] | 1 of 2 |"]
    with pytest.raises(InputError, match='sweep "decay" has nothing to compare with "none"; its points are other, plain'):
        gains_table({**record(runs), "name": "decay"}, "none")
