"""Scoring an uploaded file of questions, a few at a time, so that it can be followed, stopped, and shared with others who ask."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.checkpoints import Checkpoint
from demo.models import Models
from ptv2.errors import InputError
from ptv2.metrics import Scores, normalise, score, score_each
from ptv2.squad import Example, load_examples

AT_A_TIME, CHARACTERS = 8, 10_000  # questions, or characters of text, that are read before others have their turn


@dataclass(frozen=True)
class Report:
    """What the methods reached on a file.

    Args:
        examples: the questions that were scored.
        of: how many the file holds.
        scores: by checkpoint name.
        answers: by checkpoint name, the answer to each example, "" for "no answer".
        f1: by checkpoint name, of each example, 0 to 1.
        problems: sentences on checkpoints that could not be asked.
    """

    examples: list[Example]
    of: int
    scores: dict[str, Scores]
    answers: dict[str, list[str]]
    f1: dict[str, list[float]]
    problems: list[str]

    @property
    def disagreements(self) -> list[int]:
        """Indices of the examples to which the methods gave different answers."""
        columns = list(self.answers.values())
        return [i for i in range(len(self.examples)) if len({normalise(column[i]) for column in columns}) > 1]


def read_questions(file: Path, shown_as: str) -> list[Example]:
    """The questions of an uploaded SQuAD file.

    Args:
        shown_as: what the file is called in a sentence on what is wrong with it, instead of its place on this machine.

    Raises:
        InputError: it is not such a file.
    """
    try:
        return load_examples(file)
    except InputError as error:
        raise InputError(str(error).replace(str(file), shown_as)) from error


def score_questions(models: Models, chosen: list[Example], of: int, checkpoints: Sequence[Checkpoint]) -> Iterator[int | Report]:
    """Yields how many questions are done, again and again, and at last the report.

    Args:
        chosen: the questions to score.
        of: how many the file holds.
    """
    answers: dict[str, list[str]] = {checkpoint.name: [] for checkpoint in checkpoints}
    problems: dict[str, str] = {}
    done = 0
    for some in _portions(chosen):
        yield done
        done += len(some)
        asked = [checkpoint for checkpoint in checkpoints if checkpoint.name not in problems]
        replies = models.ask([example.question for example in some], [example.context for example in some], asked)
        for name, replied in replies.items():
            problems.update((name, reply.error) for reply in replied if reply.error)
            answers[name] += [reply.prediction.best.text for reply in replied if reply.prediction]
    answers = {name: given for name, given in answers.items() if name not in problems}
    by_id = {name: {e.id: text for e, text in zip(chosen, given, strict=True)} for name, given in answers.items()}
    scores = {name: score(given, chosen) for name, given in by_id.items()}
    f1 = {name: score_each(given, chosen)[1].tolist() for name, given in by_id.items()}
    yield Report(chosen, of, scores, answers, f1, list(problems.values()))


def _portions(examples: list[Example]) -> Iterator[list[Example]]:
    portion: list[Example] = []
    for example in examples:
        portion.append(example)
        if len(portion) == AT_A_TIME or sum(len(one.context) for one in portion) >= CHARACTERS:
            yield portion
            portion = []
    if portion:
        yield portion


def report_dict(report: Report) -> dict:
    """A report as JSON holds it."""
    questions = [
        {
            "id": example.id,
            "question": example.question,
            "accepted": [span.text for span in example.answers],
            "answers": {name: given[i] for name, given in report.answers.items()},
            "f1": {name: values[i] for name, values in report.f1.items()},
        }
        for i, example in enumerate(report.examples)
    ]
    methods = {name: asdict(scores) for name, scores in report.scores.items()}
    return {"scored": len(report.examples), "in_file": report.of, "methods": methods, "questions": questions, "problems": report.problems}


def report_csv(report: Report) -> str:
    """One line a question: what is accepted, and each method's answer with its F1."""
    file = io.StringIO()
    writer = csv.writer(file)
    columns = [f"{name} {what}" for name in report.answers for what in ("answer", "F1")]
    writer.writerow(["id", "question", "accepted", *columns])
    for row in report_dict(report)["questions"]:
        cells = [cell for name in report.answers for cell in (row["answers"][name], f"{row['f1'][name]:.3f}")]
        writer.writerow([row["id"], row["question"], " | ".join(row["accepted"]), *cells])
    return file.getvalue()


def write_report(report: Report, folder: Path) -> tuple[str, str]:
    """The paths of scores.csv and scores.json, written into `folder`."""
    table, record = folder / "scores.csv", folder / "scores.json"
    table.write_text(report_csv(report), encoding="utf-8-sig", newline="")  # the mark tells spreadsheets that it is UTF-8
    record.write_text(json.dumps(report_dict(report), indent=2, ensure_ascii=False), encoding="utf-8")
    return str(table), str(record)
