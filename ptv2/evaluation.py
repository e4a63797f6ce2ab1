"""Scoring a trained run, or answers from elsewhere, and the record that it leaves: the scores, and each question's own."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ptv2 import records
from ptv2.answers import Prediction, QuestionAnswerer
from ptv2.errors import InputError
from ptv2.metrics import best_threshold, score, score_each
from ptv2.squad import Example, examples_sha256, load_examples, read_json


def evaluation_record(
    run: str | Path, answerer: QuestionAnswerer, data: str, examples: list[Example], predictions: list[Prediction], command: str
) -> dict:
    """What a run reached on questions, and all that repeats it.

    Args:
        run: its directory.
        answerer: made of it.
        data: where the examples come from; a file's folder is left out.
        predictions: one per example, in order.
        command: that repeats this.

    Returns:
        exact_match and f1, each with value and 95 % interval in percent; n; where some questions are unanswerable also the parts and
        the best threshold; `questions`, the scores one by one (see `pack_scores`); and the provenance.
    """
    best = {e.id: p.best.text for e, p in zip(examples, predictions, strict=True)}
    result = score(best, examples).to_dict()
    if any(example.is_impossible for example in examples):
        spans = {e.id: p.best_span.text for e, p in zip(examples, predictions, strict=True)}
        odds = {e.id: p.no_answer_odds for e, p in zip(examples, predictions, strict=True)}
        result["best_f1"], result["best_f1_threshold"] = best_threshold(spans, examples, odds)
    return {
        "run": Path(run).resolve().name, "method": answerer.model.method, "answers": asdict(answerer.answers),
        "data": Path(data).name, "data_sha256": examples_sha256(examples), **result,
        "questions": pack_scores(*score_each(best, examples)), **records.provenance(command),
    }  # fmt: skip


def pack_scores(exact_match: np.ndarray, f1: np.ndarray) -> dict[str, str]:
    """Scores of every question, 0 to 1, float [n] each, as two strings in the questions' order: "01..." and "0 0.6667 1 ..."."""
    return {"exact_match": "".join(f"{value:.0f}" for value in exact_match), "f1": " ".join(f"{value:.4g}" for value in f1)}


def unpack_scores(evaluation: dict) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of every question, 0 to 1, float64 [n] each, from an evaluation's record.

    Raises:
        InputError: it was written without them.
    """
    packed = evaluation.get("questions")
    if packed is None:
        raise InputError(f"The evaluation of {evaluation.get('run')} holds no scores of single questions: run `ptv2 evaluate` again.")
    return np.array([float(digit) for digit in packed["exact_match"]]), np.array([float(part) for part in packed["f1"].split()])


def published_record(predictions: Path, data: str, source: str, licence: str, command: str) -> dict:
    """What systems reached whose answers are at hand.

    Args:
        predictions: a file of {system: {question id: answer}}, or of one system's {question id: answer}, plain or gzip.
        data: the questions. Each system is scored on those that it answered.
        source, licence: where the predictions come from, and under which licence.

    Returns:
        under `systems`, best first, each one's exact_match and f1 (value and 95 % interval, percent) and n; and the provenance.

    Raises:
        InputError: the file is of another form, or answers none of the questions.
    """
    content, examples = read_json(predictions), load_examples(data, "dev")
    if isinstance(content, dict) and all(isinstance(answer, str) for answer in content.values()):
        content = {predictions.name.partition(".")[0]: content}
    if not isinstance(content, dict) or not all(isinstance(answers, dict) for answers in content.values()):
        raise InputError(f"{predictions} must hold {{question id: answer}}, or one such object for each system.")
    systems = {}
    for name, answers in content.items():
        answered = [example for example in examples if isinstance(answers.get(example.id), str)]
        if not answered:
            raise InputError(f"{predictions}: {name} answers none of the questions in {data}.")
        systems[name] = score(answers, answered).to_dict()
    return {
        "predictions": predictions.name, "source": source, "licence": licence, "data": Path(data).name,
        "data_sha256": examples_sha256(examples),
        "systems": dict(sorted(systems.items(), key=lambda item: -item[1]["f1"]["value"])), **records.provenance(command),
    }  # fmt: skip
