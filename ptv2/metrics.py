"""Exact match and F1 of answers, their uncertainty, and whether two systems differ.

SQuAD 1.1 goes through torchmetrics (Rajpurkar et al., EMNLP 2016). SQuAD 2.0 follows the official definitions
(`evaluate-v2.0.py`, https://rajpurkar.github.io/SQuAD-explorer/): an unanswerable question scores 1 for the empty
answer and 0 for any other. All scores are percentages.
"""

import re
import string
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from torchmetrics.functional.text import squad

from ptv2.errors import InputError
from ptv2.squad import Example

if TYPE_CHECKING:
    from ptv2.answers import Answer

# What an answer can be, from right to wrong; see `answer_kind`.
KINDS = ("exact", "too long", "too short", "shifted", "wrong place", "declined, has an answer", "answered, has none")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap 95 % interval, in percent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What a system reached on a set of questions, in percent; the last three only where some are unanswerable."""

    exact_match: Interval
    f1: Interval
    n: int
    has_answer_exact_match: float | None = None
    has_answer_f1: float | None = None
    no_answer_exact_match: float | None = None

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space, as both official scripts do."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def question_scores(prediction: str, example: Example) -> tuple[float, float]:
    """Exact match and F1 of one answer, 0 to 1: the best over the accepted answers."""
    # As in evaluate-v2.0.py, an accepted answer of punctuation or articles alone counts as none.
    golds = [span.text for span in example.answers if normalise(span.text)] or [""]
    exact = max(float(normalise(prediction) == normalise(gold)) for gold in golds)
    return exact, max(_f1(normalise(prediction).split(), normalise(gold).split()) for gold in golds)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def score(predictions: dict[str, str], examples: list[Example]) -> Scores:
    """Score predictions in the official form, {question id: text}, "" for "no answer".

    Raises:
        InputError: there are no questions, or one has no prediction.
    """
    em, f1 = score_each(predictions, examples)
    impossible = np.array([example.is_impossible for example in examples])
    parts = {}
    if impossible.any():
        overall = 100 * em.mean(), 100 * f1.mean()
        parts["no_answer_exact_match"] = 100 * float(em[impossible].mean())
        if not impossible.all():
            parts["has_answer_exact_match"] = 100 * float(em[~impossible].mean())
            parts["has_answer_f1"] = 100 * float(f1[~impossible].mean())
    else:
        overall = _torchmetrics(predictions, examples)
    exact_match, f1 = (Interval(float(value), *bootstrap_interval(scores)) for value, scores in zip(overall, (em, f1), strict=True))
    return Scores(exact_match, f1, len(examples), **parts)


def score_each(predictions: dict[str, str], examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of every question, 0 to 1, float64 [n] each.

    Raises:
        InputError: there are no questions, or one has no prediction.
    """
    if not examples:
        raise InputError("There are no questions to score.")
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        raise InputError(f"{len(missing)} questions have no prediction, the first is {missing[0]}: predict all of them.")
    pairs = np.array([question_scores(predictions[example.id], example) for example in examples])
    return pairs[:, 0], pairs[:, 1]


def _torchmetrics(predictions: dict[str, str], examples: list[Example]) -> tuple[float, float]:
    result = squad(
        [{"id": example.id, "prediction_text": predictions[example.id]} for example in examples],
        [
            {
                "id": example.id,
                "answers": {
                    "text": [span.text for span in example.answers],
                    "answer_start": [span.start for span in example.answers],
                },
            }
            for example in examples
        ],
    )
    return float(result["exact_match"]), float(result["f1"])


def answer_kind(answer: "Answer", example: Example) -> str:
    """Which of KINDS an answer is.

    "exact" is an exact match, a rightly declined question included. The next four go by the answer's place in the text: it
    holds an accepted answer and more, lies within one, overlaps one, or touches none.
    """
    if question_scores(answer.text, example)[0]:
        return "exact"
    if example.is_impossible:
        return "answered, has none"
    if not answer.text:
        return "declined, has an answer"
    places = [(span.start, span.end) for span in example.answers]
    if any(answer.start <= start and end <= answer.end for start, end in places):
        return "too long"
    if any(start <= answer.start and answer.end <= end for start, end in places):
        return "too short"
    overlaps = any(answer.start < end and start < answer.end for start, end in places)
    return "shifted" if overlaps else "wrong place"


def best_threshold(span_predictions: dict[str, str], examples: list[Example], no_answer_odds: dict[str, float]) -> tuple[float, float]:
    """The threshold on the odds of "no answer" with the best F1, `find_best_thresh` of evaluate-v2.0.py.

    Args:
        span_predictions: by question id, the best span, whatever the odds of "no answer".
        no_answer_odds: by question id, the logit of "no answer" minus that of the best span.

    Returns:
        (F1 in percent, threshold): "no answer" is given where the odds exceed the threshold.
    """
    _, f1 = score_each(span_predictions, examples)
    _, declined = score_each(dict.fromkeys(span_predictions, ""), examples)
    odds = np.array([no_answer_odds[example.id] for example in examples])
    order = np.argsort(odds, kind="stable")
    # With a threshold below all odds every question is declined; each step up answers one more.
    totals = declined.sum() + np.concatenate(([0.0], np.cumsum((f1 - declined)[order])))
    equal_to_next = np.append(odds[order][:-1] == odds[order][1:], False)  # equal odds are answered together
    totals[1:][equal_to_next] = -np.inf
    answered = int(totals.argmax())
    threshold = odds[order][answered - 1] if answered else np.nextafter(odds.min(), -np.inf)
    return 100 * float(totals[answered]) / len(examples), float(threshold)


def bootstrap_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of per-question scores (0 to 1), in percent; questions are resampled.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    means = _resampled_means(values, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


@dataclass(frozen=True)
class Comparison:
    """System a minus system b on the same questions, in percent, and the two-sided bootstrap p-value of no difference."""

    difference: Interval
    p_value: float
    n: int


def compare(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Paired bootstrap between two systems' per-question scores, 0 to 1, float [n] each in the same order.

    Source: Berg-Kirkpatrick et al., EMNLP 2012, https://aclanthology.org/D12-1091.

    Raises:
        InputError: the two are of different length.
    """
    if a.shape != b.shape:
        raise InputError(f"The systems answered {len(a)} and {len(b)} questions; compare them on the same ones.")
    difference = a - b
    means = _resampled_means(difference, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    # The resampled means are centred on the observed difference; under "no difference" they would be centred on 0.
    extreme = np.abs(means - difference.mean()) >= abs(difference.mean()) - 1e-12  # equal but for rounding
    interval = Interval(100 * float(difference.mean()), 100 * float(low), 100 * float(high))
    return Comparison(interval, float((extreme.sum() + 1) / (resamples + 1)), len(a))


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = len(values)
    return np.array([values[rng.integers(0, n, n)].mean() for _ in range(resamples)])
