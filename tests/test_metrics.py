"""EM and F1 against published systems, torchmetrics and hand-worked cases; thresholds, intervals and comparisons against brute force."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import QUESTION_FILES, REAL_SOURCES, SHARED_FILES
from torchmetrics.functional.text import squad

from ptv2.answers import Answer
from ptv2.errors import InputError
from ptv2.metrics import KINDS, answer_kind, best_threshold, bootstrap_interval, compare, normalise, question_scores, score, score_each
from ptv2.squad import Example, Span, load_examples

# The official SQuAD 1.1 script on five published systems' answers: questions answered, exact match, F1.
OFFICIAL = {
    "BERT (ensemble)": (1190, 74.87, 86.32),
    "r-net+ (ensemble)": (1190, 72.77, 83.41),
    "SLQA+ (ensemble)": (1190, 72.18, 82.85),
    "Match-LSTM with Ans-Ptr (Boundary+Ensemble)": (1190, 61.09, 72.67),
    "Logistic Regression Baseline": (1188, 34.60, 45.93),
}


def published() -> list:
    """Each published system in the shared data, with its answers and the questions they belong to."""
    found = []
    for file in set(SHARED_FILES) - set(QUESTION_FILES):
        (questions,) = [path for path in QUESTION_FILES if "xquad_en" in path.name]
        for system, answers in json.loads(gzip.decompress(file.read_bytes())).items():
            (name,) = [name for name in OFFICIAL if system.startswith(name)]
            found.append(pytest.param(name, answers, questions, id=name))
    return found


@pytest.mark.parametrize(("system", "predictions", "questions"), published())
def test_published_systems_score_what_the_official_script_gives(system, predictions, questions):
    scores = score(predictions, [example for example in load_examples(questions) if example.id in predictions])
    assert (scores.n, round(scores.exact_match.value, 2), round(scores.f1.value, 2)) == OFFICIAL[system]
    for interval in (scores.exact_match, scores.f1):
        assert interval.value - 4 < interval.low < interval.value < interval.high < interval.value + 4  # n = 1,190
    assert set(scores.to_dict()) == {"exact_match", "f1", "n"}


def example(*answers: str, name: str = "1") -> Example:
    return Example(name, "T", "?", " ".join(answers) or "text", tuple(Span(answer, 0) for answer in answers))


def random_predictions(examples: list[Example], seed: int) -> dict[str, str]:
    """Right, nearly right and wrong answers."""
    rng, predictions = np.random.default_rng(seed), {}
    for e in examples:
        span = e.answers[rng.integers(len(e.answers))]
        start, end = max(0, span.start + rng.integers(-12, 3)), span.end + rng.integers(-2, 12)
        predictions[e.id] = (span.text, f"The {span.text.upper()}!", e.context[start:end], e.context[:20])[rng.integers(4)]
    return predictions


@pytest.mark.parametrize("source", REAL_SOURCES, ids=lambda source: Path(source).name)
def test_scores_of_single_questions_average_to_torchmetrics_aggregate(source):
    examples = [e for e in load_examples(source) if not e.is_impossible][:800]
    predictions = random_predictions(examples, seed=0)
    targets = [
        {"id": e.id, "answers": {"text": [s.text for s in e.answers], "answer_start": [s.start for s in e.answers]}} for e in examples
    ]
    expected = squad([{"id": e.id, "prediction_text": predictions[e.id]} for e in examples], targets)
    exact, f1 = score_each(predictions, examples)
    assert 100 * exact.mean() == pytest.approx(float(expected["exact_match"]), abs=1e-3)
    assert 100 * f1.mean() == pytest.approx(float(expected["f1"]), abs=1e-3)
    assert 20 < 100 * exact.mean() < 100 * f1.mean() < 90
    scores = score(predictions, examples)
    assert (scores.exact_match.value, scores.f1.value) == pytest.approx((100 * exact.mean(), 100 * f1.mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick\tbrown-fox, a U.S. icon!", "quick brownfox us icon"),
        ("an Anthem of the theatre", "anthem of theatre"),
        ("A. The an", ""),
        ("“Café” – 3.5 °C", "“café” – 35 °c"),  # only ASCII punctuation counts, as in both official scripts
    ],
)
def test_normalisation_is_that_of_the_official_scripts(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Eiffel Tower!", ["the Eiffel tower"], 1, 1),
        ("black tea", ["cold black water"], 0, 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3)),
        ("new new york", ["new york york"], 0, 2 / 3),  # words count as often as they stand in both
        ("in 1871", ["1871 or so", "in 1871", "1871"], 1, 1),  # the best accepted answer
        ("red", ["blue"], 0, 0),
        ("", ["blue"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),  # nothing is left of it
        ("blue", [], 0, 0),
        ("...", ["..."], 1, 1),  # an accepted answer of punctuation alone counts as none
        ("", ["?!"], 1, 1),
        ("blue", ["?!"], 0, 0),
        ("", ["?!", "blue"], 0, 0),
        ("?!", ["?!", "blue"], 0, 0),
    ],
)
def test_one_answer_scores_as_worked_out_by_hand(prediction, answers, exact, f1):
    assert question_scores(prediction, example(*answers)) == pytest.approx((exact, f1))


def test_unanswerable_questions_are_scored_by_the_definitions_of_squad_2():
    examples = [example("blue", name="1"), example("cold black water", name="2"), *(example(name=name) for name in "345")]
    predictions = {"1": "Blue", "2": "black tea", "3": "", "4": "red", "5": "", "another question": "red"}
    scores = score(predictions, examples).to_dict()
    assert scores["exact_match"]["value"] == pytest.approx(100 * (1 + 0 + 1 + 0 + 1) / 5)
    assert scores["f1"]["value"] == pytest.approx(100 * (1 + 0.4 + 1 + 0 + 1) / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(50)
    assert scores["has_answer_f1"] == pytest.approx(70)
    assert scores["no_answer_exact_match"] == pytest.approx(200 / 3)
    assert scores["n"] == 5


def test_parts_that_do_not_exist_are_left_out():
    nothing = score({"1": "", "2": "red"}, [example(name="1"), example(name="2")])
    assert set(nothing.to_dict()) == {"exact_match", "f1", "n", "no_answer_exact_match"}
    assert nothing.no_answer_exact_match == nothing.f1.value == 50
    assert set(score({"1": "red"}, [example("red")]).to_dict()) == {"exact_match", "f1", "n"}


CONTEXT = "The old keeper tends the lamp. A keeper sleeps by the lamp."


@pytest.mark.parametrize(
    ("answer", "accepted", "kind"),
    [
        ("keeper", ["keeper"], "exact"),
        ("A keeper", ["keeper"], "exact"),  # after normalisation, and at another place
        ("old keeper tends", ["keeper"], "too long"),
        ("keeper", ["old keeper tends"], "too short"),
        ("keeper tends", ["old keeper"], "shifted"),
        ("lamp", ["old keeper"], "wrong place"),
        ("tends", ["keeper"], "wrong place"),  # beside it
        ("old keeper", ["tends", "keeper"], "too long"),  # any accepted answer
        ("", ["keeper"], "declined, has an answer"),
        ("", [], "exact"),
        ("keeper", [], "answered, has none"),
    ],
)
def test_kinds_of_answers(answer, accepted, kind):
    spans = tuple(Span(text, CONTEXT.index(text)) for text in accepted)
    start = CONTEXT.index(answer)
    assert answer_kind(Answer(answer, start, start + len(answer), 1.0, 0.0), Example("1", "", "Who?", CONTEXT, spans)) == kind
    assert kind in KINDS


def test_a_missing_prediction_is_refused_with_the_question():
    examples = [example("blue", name=name) for name in ("first", "second", "third")]
    for refused in (score, score_each):
        with pytest.raises(InputError, match="2 questions have no prediction, the first is second: predict all of them"):
            refused({"first": "blue"}, examples)
        with pytest.raises(InputError, match="There are no questions to score"):
            refused({}, [])


# Thresholds


@pytest.mark.parametrize("seed", range(40))
def test_the_best_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    names = [str(i) for i in range(n)]
    answers = (["cold black water"], [], ["?!"])
    examples = [example(*answers[rng.choice(3, p=[0.5, 0.4, 0.1])], name=name) for name in names]
    spans = {name: str(rng.choice(["cold water", "cold black water", "red", ""])) for name in names}
    whole = seed % 2  # whole numbers make ties
    odds = {name: float(rng.integers(-3, 4) if whole else rng.normal()) for name in names}

    def f1_at(threshold: float) -> float:
        return 100 * score_each({name: "" if odds[name] > threshold else spans[name] for name in names}, examples)[1].mean()

    f1, threshold = best_threshold(spans, examples, odds)
    assert f1 == pytest.approx(f1_at(threshold))
    assert f1 == pytest.approx(max(f1_at(t) for t in (-math.inf, *odds.values())))


# Intervals and comparisons


@pytest.mark.parametrize("mean", [0.2, 0.7])
def test_the_bootstrap_interval_agrees_with_the_normal_approximation(mean):
    values = (np.random.default_rng(0).random(1500) < mean).astype(float)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((100 * (values.mean() - half), 100 * (values.mean() + half)), abs=0.2)


def test_the_bootstrap_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(0).random(50)
    first = bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) == first != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize("values", [[0.25], [1.0] * 30, [0.0] * 30])
def test_without_spread_the_interval_is_the_value(values):
    assert bootstrap_interval(np.array(values)) == (100 * values[0], 100 * values[0])


def systems(n: int, better: float, worse: float) -> tuple[np.ndarray, np.ndarray]:
    """Two systems that agree but on a share of the questions, where one of them is right."""
    rng = np.random.default_rng(0)
    b, drawn = (rng.random(n) < 0.5).astype(float), rng.random(n)
    a = np.where(drawn < better, 1.0, np.where(drawn > 1 - worse, 0.0, b))
    return a, b


def test_the_comparison_is_paired():
    """A gain of a few percent on the same questions is certain, though the systems' own intervals overlap."""
    a, b = systems(1000, better=0.05, worse=0.0)
    comparison = compare(a, b)
    assert comparison.n == 1000
    assert comparison.difference.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert 0 < comparison.difference.low < comparison.difference.value < comparison.difference.high
    assert comparison.p_value < 0.001
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]


def test_swapping_the_systems_turns_the_sign_only():
    a, b = systems(400, better=0.08, worse=0.04)
    one, other = compare(a, b), compare(b, a)
    assert one.difference.value == -other.difference.value > 0
    assert (one.difference.low, one.difference.high) == pytest.approx((-other.difference.high, -other.difference.low))
    assert one.p_value == other.p_value


@pytest.mark.parametrize(("better", "worse"), [(0.06, 0.06), (0.08, 0.06), (0.1, 0.06), (0.12, 0.06)])
def test_the_p_value_agrees_with_the_normal_approximation(better, worse):
    a, b = systems(600, better, worse)
    z = abs((a - b).mean()) / ((a - b).std() / math.sqrt(len(a)))
    assert compare(a, b).p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)


def test_the_p_value_of_few_questions_agrees_with_all_resamples():
    """Four questions have 256 equally likely resamples; rounding must not drop those that are exactly as far off."""
    tenths = np.array([-9, -5, 7, 9])
    sums = tenths[np.indices((4, 4, 4, 4)).reshape(4, -1)].sum(0)
    expected = np.mean(np.abs(sums - tenths.sum()) >= tenths.sum())
    assert compare(tenths / 10, np.zeros(4)).p_value == pytest.approx(expected, abs=0.02)


def test_identical_systems_do_not_differ():
    a, _ = systems(200, 0.1, 0.1)
    comparison = compare(a, a.copy())
    assert comparison.p_value == 1
    assert (comparison.difference.value, comparison.difference.low, comparison.difference.high) == (0, 0, 0)


def test_a_comparison_is_repeatable():
    a, b = systems(100, 0.1, 0.05)
    assert compare(a, b) == compare(a, b)
    assert compare(a, b).p_value != compare(a, b, seed=1).p_value


def test_systems_that_answered_different_questions_are_not_compared():
    with pytest.raises(InputError, match="answered 3 and 4 questions; compare them on the same ones"):
        compare(np.zeros(3), np.zeros(4))
