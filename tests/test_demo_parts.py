"""The playground's parts without a server: what is shown, which checkpoints there are, who is asked together."""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))  # demo/ is no part of the installed package

from demo import checkpoints, page, scoring
from demo.checkpoints import Checkpoint, find_checkpoints
from demo.models import KEPT, Models, Reply
from demo.playground import Playground
from ptv2 import METHODS, Answer, Example, InputError, PrefixConfig, Span, build_model, serve
from ptv2.answers import Prediction

TEXT = "The harbour was dug by two hundred men from the islands. They were paid in herring and copper."


def checkpoint(name: str, method: str = "head-only") -> Checkpoint:
    return Checkpoint(name, Path(name), method, 0, 1000)


def reply(name: str, answer: str, text: str = TEXT, method: str = "head-only") -> Reply:
    start = text.index(answer) if answer else 0
    return Reply(checkpoint(name, method), Prediction((Answer(answer, start, start + len(answer), 0.5, 1.0),), 0.0), trained=10, share=0.1)


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_every_character_is_shown_by_one_and_none_is_markup():
    everything = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), 0xFEFF, 0x1F600, 0x10FFFF]))
    shown = page.safe(everything)
    assert not set(shown) & set("<>{}$`\"'") and not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", shown)
    assert len(html.unescape(shown)) == len(everything)
    kept = [(a, b) for a, b in zip(everything, html.unescape(shown), strict=True) if a != b]
    assert all(not a.isprintable() for a, _ in kept) and len(kept) < 2200


@pytest.mark.parametrize("length", [0, 10, 100, 1000])
def test_an_excerpt_holds_the_answer_and_is_cut_between_words(length):
    context = "left " * length + "👩‍👩‍👧 answer" + " right" * length
    start = context.index("👩")
    shown = page.highlighted(context, start, start + len("👩‍👩‍👧 answer"))
    assert re.findall(r"<mark>(.*?)</mark>", shown) == ["👩‍👩‍👧 answer"]
    inside = text_of(shown).removeprefix("… ").removesuffix(" …")
    assert inside in context and set(inside.split()) <= {"left", "right", "👩‍👩‍👧", "answer"}
    assert len(inside) < 700 and ("…" in shown) == (len(context) > 700)
    long_word = "x" * 5000
    assert "<mark>xx</mark>" in page.highlighted(long_word, 2500, 2502) and "<mark>" not in page.highlighted(long_word, 0, 0)


def test_agreement_is_told_and_lettered():
    told = page.results([reply("a", "herring and copper"), reply("b", "two hundred"), reply("c", "herring and copper")], TEXT, None)
    assert "2 different answers" in told
    assert re.findall(r"<h2>[^<]*<span[^>]*>(\w)</span>", told) == ["A", "B", "A"]
    same = page.results([reply("a", "The harbour"), reply("b", "harbour")], TEXT, ["harbour"])  # articles do not count
    assert "All 2 agree" in same and same.count("✓ right") == 2 and "Right answer: “harbour”" in text_of(same)


def test_no_answer_and_what_is_right_then():
    told = page.results([reply("a", ""), reply("b", "copper")], TEXT, [])
    assert "no answer in this text" in told and "the text does not say" in told
    assert told.count("✓ right") == 1 and told.count("✗ not an accepted answer") == 1 and told.count("<mark>") == 1


def test_a_method_that_fails_leaves_the_others_their_card():
    told = page.results([Reply(checkpoint("a"), error="It <broke>."), reply("b", "copper")], TEXT, None)
    assert "It &lt;broke&gt;." in told and told.count("<mark>copper</mark>") == 1 and "agree" not in told


def test_the_methods_are_those_of_the_package():
    assert {name: title.lower() for name, (title, _) in page.METHODS.items()} == {
        name: method.title.lower() for name, method in METHODS.items()
    }
    told = page.intro([checkpoint(name, name) for name in [*METHODS, "unknown"]])
    assert told.count("<svg") == len(METHODS) and told.count("<h1>") == 1


def test_what_ships_comes_first_then_runs_newest_first(tmp_path, tiny_bert):
    model = build_model("head-only", str(tiny_bert))
    for name in ("old", "new", "half", "broken"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "half" / "model.safetensors").unlink()
    (tmp_path / "broken" / "ptv2.json").write_text("{")
    (tmp_path / "a file").write_text("")
    for age, name in enumerate(["broken", "new", "old"]):
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    names = [found.name for found in find_checkpoints(tmp_path)]
    assert names == ["p-tuning-v2", "fine-tuning", "head-only", "runs/broken", "runs/new", "runs/old"]
    assert {found.name: found.method for found in find_checkpoints(tmp_path)}["runs/broken"] == "unknown"
    assert len(find_checkpoints(tmp_path / "nowhere")) == len(find_checkpoints(None)) == 3


@pytest.fixture
def runs(tmp_path, tiny_bert, tiny_roberta) -> Path:
    """Two prefixes and a head on one backbone, a head on another, and a model of its own."""
    small = {"windows": {"max_length": 96, "stride": 16, "max_question_length": 20}}
    for i in (1, 2):
        build_model("p-tuning-v2", str(tiny_bert), PrefixConfig(i, init="normal"), seed=i).save_pretrained(
            tmp_path / f"prefix-{i}", **small
        )
    build_model("head-only", str(tiny_bert), seed=3).save_pretrained(tmp_path / "head", **small)
    build_model("head-only", str(tiny_roberta), seed=4).save_pretrained(tmp_path / "other", **small)
    build_model("bitfit", str(tiny_bert), seed=5).save_pretrained(tmp_path / "bitfit", **small)
    return tmp_path


def test_those_that_share_a_backbone_are_answered_in_one_pass_and_as_if_alone(runs):
    found = [one for one in find_checkpoints(runs) if one.name.startswith("runs/")]
    together = Models().compare("Who was paid?", TEXT * 3, found)
    assert [one.checkpoint for one in together] == found
    assert {one.checkpoint.name: one.in_pass for one in together} == {
        "runs/prefix-1": 3, "runs/prefix-2": 3, "runs/head": 3, "runs/other": 1, "runs/bitfit": 1,
    }  # fmt: skip
    trained = {one.checkpoint.name: one.trained for one in together}
    assert trained["runs/prefix-2"] - trained["runs/head"] == 2 * 2 * 2 * 32 and trained["runs/head"] == 2 * 32 + 2
    for one in together:
        alone = Models().compare("Who was paid?", TEXT * 3, [one.checkpoint])[0]
        assert alone.in_pass == 1 and not one.error
        assert one.prediction.best.text == alone.prediction.best.text
        assert one.prediction.best.logit == pytest.approx(alone.prediction.best.logit, abs=1e-3)


def test_only_a_few_models_are_kept_and_changed_ones_are_read_again(runs):
    models = Models()
    found = [one for one in find_checkpoints(runs) if one.name.startswith("runs/")]
    for one in found:
        models.compare("Who?", TEXT, [one])
    assert len(models._kept) == KEPT < len(found)
    before = models.compare("Who?", TEXT, [found[0]])[0]
    shutil.rmtree(found[0].path)
    assert "is no longer there" in models.compare("Who?", TEXT, [found[0]])[0].error
    assert before.prediction
    with pytest.raises(InputError, match="has no prefix to look at"):
        models.look_inside("Who?", TEXT, next(one for one in found[1:] if one.method != "p-tuning-v2"))


def test_looking_inside_tells_where_answers_start_and_end(runs):
    text = TEXT * 8
    found = Models().look_inside("Who was paid?", text, next(one for one in find_checkpoints(runs) if one.name == "runs/prefix-2"))
    assert found.attention.shape == (2, 4) and 0 < found.attention.min() <= found.attention.max() < 1
    assert len(found.tokens) == len(found.start) == len(found.end) and found.windows > 1
    assert 0 < sum(found.start) <= 1.0001 and 0 < sum(found.end) <= 1.0001
    shown = page.inside(found, "Who?", text, "")
    assert f"the one of the text’s {found.windows} windows" in shown
    start, end = found.tokens[0][0], found.tokens[-1][1]
    assert text_of(re.search(r'start scores">(.*?)</div>', shown, re.S).group(1)) == text[start:end]


def test_a_report_in_every_form(tmp_path):
    examples = [Example(str(i), "", f"<b>{i}</b>?", TEXT, (Span("copper", TEXT.index("copper")),)) for i in range(3)]
    examples.append(Example("3", "", "Nobody?", TEXT, ()))

    class Two:
        """Two methods that differ on one question, and one that fails at the second look."""

        def ask(self, questions, contexts, asked):
            told = {one.name: [reply(one.name, "copper" if "Nobody" not in q else "") for q in questions] for one in asked}
            if "b" in told and "<b>1</b>?" in questions:
                told["b"][questions.index("<b>1</b>?")] = reply("b", "men")
            if "c" in told:
                told["c"] = [Reply(checkpoint("c"), error="c is gone.")] * len(questions)
            return told

    *steps, report = scoring.score_questions(Two(), examples, 9, [checkpoint(name) for name in "abc"])
    assert steps == [0] and report.disagreements == [1] and report.problems == ["c is gone."]
    assert report.scores["a"].exact_match.value == 100 and report.scores["b"].exact_match.value == 75
    shown = page.report(report, {"a": "A", "b": "<B>", "c": "C"})
    assert "4 of the file’s 9 questions scored" in text_of(shown) and "They disagree on 1 question<" in shown
    assert "&lt;b&gt;1&lt;/b&gt;?" in shown and "&lt;B&gt;" in shown and "<B>" not in shown
    table, record = scoring.write_report(report, tmp_path)
    lines = Path(table).read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == "id,question,accepted,a answer,a F1,b answer,b F1" and lines[2] == "1,<b>1</b>?,copper,copper,1.000,men,0.000"
    assert '"in_file": 9' in Path(record).read_text()


def test_long_texts_are_scored_in_small_portions():
    examples = [Example(str(i), "", "Who?", "x" * length, ()) for i, length in enumerate([10] * 17 + [20_000] * 2 + [6000] * 3)]
    portions = list(scoring._portions(examples))
    assert [len(portion) for portion in portions] == [8, 8, 2, 1, 2, 1]
    assert [example for portion in portions for example in portion] == examples


def test_names_are_chosen_within_limits(monkeypatch, tmp_path):
    playground = Playground()
    assert [one.name for one in playground.choose(None)] == ["p-tuning-v2", "fine-tuning", "head-only"]
    assert [one.name for one in playground.choose(["head-only", "head-only"])] == ["head-only"]
    refused = {"No method is chosen": [], "at most 6 fit": ["head-only"] * 7, "x is not there": ["x"], "must be a list": "head-only"}
    for said, names in refused.items():
        with pytest.raises(InputError, match=said):
            playground.choose(names)
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    with pytest.raises(InputError, match="There is no P-tuning v2 method"):
        Playground().look_inside("Who?", TEXT, None)


def test_nothing_slow_is_imported_before_the_page_is_up():
    code = "import sys, ptv2, ptv2.serve, demo.app; demo.app.build(demo.app.Playground()); print([m for m in SLOW if m in sys.modules])"
    slow = ["torch", "transformers", "datasets", "peft", "matplotlib.pyplot", "torchmetrics"]
    told = subprocess.run([sys.executable, "-c", f"SLOW = {slow}; {code}"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_without_the_repository_the_command_says_where_the_playground_is(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "__file__", str(tmp_path / "ptv2" / "serve.py"))
    with pytest.raises(InputError, match="comes with the repository"):
        serve.serve(None)
