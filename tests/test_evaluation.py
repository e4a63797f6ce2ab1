"""Records of scores: of single questions, and of systems whose answers come from elsewhere."""

import gzip
import json

import numpy as np
import pytest
from conftest import DATA

from ptv2.cli import main
from ptv2.errors import InputError
from ptv2.evaluation import pack_scores, published_record, unpack_scores
from ptv2.metrics import score
from ptv2.squad import load_examples

QUESTIONS = DATA / "squad_v1.json"


def test_scores_of_questions_survive_their_packing():
    exact, f1 = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0, 2 / 3, 1.0])
    packed = pack_scores(exact, f1)
    assert packed == {"exact_match": "1001", "f1": "1 0 0.6667 1"}
    unpacked = unpack_scores({"questions": packed})
    np.testing.assert_allclose(unpacked, (exact, f1), atol=5e-5)


def test_an_evaluation_without_single_scores_is_refused():
    with pytest.raises(InputError, match="The evaluation of old-run holds no scores of single questions: run `ptv2 evaluate` again"):
        unpack_scores({"run": "old-run"})


@pytest.fixture
def answers() -> dict[str, dict[str, str]]:
    """A system that knows all, and one that answers two questions, one of them right."""
    examples = load_examples(QUESTIONS)
    right = {example.id: example.answers[0].text for example in examples}
    return {"some": {examples[0].id: right[examples[0].id], examples[1].id: "nonsense"}, "all": right}


def test_each_system_is_scored_on_what_it_answered_and_the_best_comes_first(answers, tmp_path, capsys):
    file, output = tmp_path / "predictions.json.gz", tmp_path / "published.json"
    file.write_bytes(gzip.compress(json.dumps(answers).encode()))
    words = ["score", str(file), "--data", str(QUESTIONS), "--source", "a site", "--licence", "MIT", "--output", str(output)]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(output.read_text())
    examples = load_examples(QUESTIONS)
    assert list(record["systems"]) == ["all", "some"]
    assert record["systems"]["all"] == score(answers["all"], examples).to_dict() and record["systems"]["all"]["f1"]["value"] == 100
    assert record["systems"]["some"]["n"] == 2 and record["systems"]["some"]["exact_match"]["value"] == 50
    assert (record["source"], record["licence"], record["data"]) == ("a site", "MIT", "squad_v1.json")
    assert record["command"].startswith("ptv2 score ")


def test_one_systems_answers_go_by_the_files_name(answers, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(answers["all"]))
    assert list(published_record(file, str(QUESTIONS), "", "", "")["systems"]) == ["mine"]


@pytest.mark.parametrize(
    ("content", "said"),
    [([1], "must hold {question id: answer}"), ({"a": 1}, "must hold {question id: answer}"), ({"x": {"no": "one"}}, "x answers none of")],
)
def test_predictions_of_another_form_are_refused(content, said, tmp_path):
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        published_record(file, str(QUESTIONS), "", "", "")
