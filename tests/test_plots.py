"""The report: which runs it finds, what its table says, and a figure that is the same for the same records."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from ptv2.errors import InputError
from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.plots import (
    COLOURS,
    draw_comparison,
    draw_prefix_attention,
    draw_prefix_attention_along_text,
    draw_rows,
    draw_training,
    show,
)
from ptv2.report import bytes_text, markdown_table, put_into, read_results, results_table


def write_run(folder: Path, method: str, trained: int, f1: float | None, status: str = "finished") -> None:
    folder.mkdir(parents=True)
    run = {
        "status": status,
        "config": {"method": method, "batch_size": 8, "gradient_accumulation": 2},
        "parameters": {"trained": trained, "backbone": 1_000_000, "stored_bytes": 4 * trained},
        "wall_seconds": 90.0,
        "steps": 200,
        "data": {"held_out": {"questions": 321}},
        "metrics": {"held_out_exact_match": 31.5, "held_out_f1": 42.25},
        "log_history": [{"step": 10, "eval_f1": 20.0}, {"step": 10, "loss": 3.0}, {"step": 20, "eval_f1": 42.25}],
    }
    (folder / "run.json").write_text(json.dumps(run))
    if f1 is not None:
        interval = {"value": f1, "low": f1 - 2, "high": f1 + 2}
        evaluation = {"exact_match": {"value": 40.0, "low": 38.0, "high": 42.0}, "f1": interval, "n": 1190, "data": "questions.json"}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_run(tmp_path / "full", "fine-tuning", 1_000_000, 66.0)
    write_run(tmp_path / "prefix-1", "p-tuning-v2", 6_500, 60.0)
    write_run(tmp_path / "prefix-0", "p-tuning-v2", 6_500, 62.0)
    write_run(tmp_path / "unscored", "head-only", 770, None)
    write_run(tmp_path / "cut-off", "lora", 5_000, 50.0, status="running")
    return tmp_path


def test_finished_runs_are_found_by_method_and_name(folder):
    assert [result.name for result in read_results([folder])] == ["prefix-0", "prefix-1", "full", "unscored"]


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="No finished run lies under"):
        read_results([tmp_path])


def test_the_table_says_what_the_records_say(folder):
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in results_table(read_results([folder])).splitlines()[2:]}
    assert "| 6,500 | 0.65 % | 26 kB | 3,200 | 1.5 | 40.0 [38.0, 42.0] | 62.0 [60.0, 64.0] | 1,190 of questions.json |" in rows["prefix-0"]
    assert "| 1,000,000 | 100 % | 4.0 MB |" in rows["full"]
    assert "| 3,200 | 1.5 | 31.5 | 42.2 | 321 held out of training |" in rows["unscored"]


def test_the_table_sets_the_mean_over_seeds_against_fine_tuning(folder):
    assert results_table(read_results([folder])).endswith(
        "P-tuning v2: mean F1 61.0 over 2 seeds (60.0 to 62.0), 92.4 % of full fine-tuning's 66.0."
    )


@pytest.mark.parametrize(("count", "text"), [(592_904, "593 kB"), (90_264_584, "90.3 MB"), (9_026_458_400, "9.0 GB")])
def test_sizes_have_the_unit_that_reads_best(count, text):
    assert bytes_text(count) == text


def test_a_table_of_numbers_is_markdown():
    assert markdown_table(["method", "F1"], [["LoRA", 1.5], ["head", 2]]) == "| method | F1 |\n| --- | --: |\n| LoRA | 1.5 |\n| head | 2 |"


def test_a_prefix_scored_on_other_questions_stays_out_of_the_mean(folder):
    sentence = results_table(read_results([folder])).splitlines()[-1]
    write_run(folder / "elsewhere", "p-tuning-v2", 6_500, 10.0)
    file = folder / "elsewhere" / "evaluation.json"
    file.write_text(file.read_text().replace("questions.json", "other.json"))
    assert results_table(read_results([folder])).splitlines()[-1] == sentence


def test_the_same_records_give_the_same_figure_in_both_formats(folder, tmp_path):
    results = read_results([folder])
    for name in ("a.svg", "b.png"):
        draw_comparison(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for name in ("a.png", "b.png"):
        assert plt.imread(tmp_path / name).std() > 0.05  # something is drawn
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text


def test_every_method_has_a_colour():
    assert set(COLOURS) == set(METHODS)


def test_the_table_is_put_between_its_marks_and_nowhere_else(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n")
    for table in ("first", "second"):
        put_into(file, table)
    assert file.read_text() == "above\n<!-- results -->\n\nsecond\n\n<!-- /results -->\nbelow\n"


def test_a_page_without_marks_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("above <!-- results --> below")
    with pytest.raises(InputError, match="lacks the marks"):
        put_into(file, "table")
    assert file.read_text() == "above <!-- results --> below"


@pytest.mark.parametrize("kept", [True, False])
def test_a_figure_is_shown_once_and_kept_beside_its_data(tmp_path, displayed, kept):
    output_dir = tmp_path / "figures"
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot([1, 2])
    show(figure, "a_line", {"y": [1, 2]}, str(output_dir) if kept else "")
    ((data, metadata),) = displayed
    picture = base64.b64decode(data["image/png"])
    assert plt.imread(io.BytesIO(picture)).shape[:2] == (432, 720)
    assert metadata["image/png"] == {"width": 480, "alt": "a line"}
    assert not plt.fignum_exists(figure.number)
    if not kept:
        assert not output_dir.exists()
        return
    assert {file.name for file in output_dir.iterdir()} == {"a_line.svg", "a_line.png", "a_line.json"}
    assert (output_dir / "a_line.png").read_bytes() == picture
    assert json.loads((output_dir / "a_line.json").read_text()) == {"y": [1, 2]}
    assert "<svg" in (output_dir / "a_line.svg").read_text()


def texts(figure) -> list[str]:
    """All that stands written in a figure."""
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text() and text.get_visible()]


def test_heat_maps_show_every_share(request):
    shares = np.random.default_rng(0).random((3, 4))
    tokens = ["who", "keeps", "the", "light"]
    for figure in (draw_prefix_attention(shares), draw_prefix_attention_along_text(shares, tokens)):
        request.addfinalizer(lambda figure=figure: plt.close(figure))
        (image,) = figure.axes[0].images
        assert np.allclose(image.get_array(), 100 * shares) and image.get_clim() == (0, 100)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == tokens
    written = [text.get_text() for text in draw_prefix_attention(shares).axes[0].texts]
    assert written == [f"{100 * share:.0f}" for share in shares.flat]


def test_training_is_drawn_against_windows_with_the_recorded_runs_behind(folder, request):
    full, *others = (result for result in read_results([folder]) if result.name in ("full", "prefix-0", "prefix-1"))
    figure = draw_training(full, others, 3.5)
    request.addfinalizer(lambda: plt.close(figure))
    loss, f1 = figure.axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[160, 3.0]]] * 3
    *curves, untrained = f1.lines
    assert [line.get_xydata().tolist() for line in curves] == [[[160, 20.0], [320, 42.25]]] * 3
    assert curves[-1].get_color() == COLOURS[full.method] and set(untrained.get_ydata()) == {3.5}
    assert {"this run", "recorded runs", "untrained"} <= set(texts(figure))


def test_rows_are_bars_for_numbers_and_dots_for_intervals(request):
    bars = draw_rows(["a", "b"], {"one": [3, 4], "two": [30, 1]}, "questions")
    dots = draw_rows(["a", "b"], {"one": [Interval(-1, -4, 2), Interval(5, 1, 8)]}, "points")
    request.addfinalizer(lambda: [plt.close(figure) for figure in (bars, dots)])
    assert [patch.get_width() for patch in bars.axes[0].patches] == [3, 4, 30, 1]
    assert {"3", "4", "30", "1", "one", "two", "questions"} <= set(texts(bars))
    (container,) = dots.axes[0].containers
    assert container.lines[0].get_xydata().tolist() == [[-1, 0], [5, 1]]
    assert [segment[:, 0].tolist() for segment in container.lines[2][0].get_segments()] == [[-4, 2], [1, 8]]
    assert "one" not in texts(dots)  # one series needs no name
    for figure in (bars, dots):
        low, high = figure.axes[0].get_ylim()
        assert low > high  # the first row on top
