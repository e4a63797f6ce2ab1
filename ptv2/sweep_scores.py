"""What the runs of a sweep say together: F1 by point over seeds, and of several sweeps by start and number of questions."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from ptv2.methods import METHODS
from ptv2.metrics import Interval
from ptv2.prefix import INITIALISERS


def trial_f1(trial: dict) -> Interval:
    """A run's F1 in percent: on the evaluation's questions if it has one, else on the held-out ones, without an interval."""
    return Interval(**trial["evaluation"]["f1"]) if trial["evaluation"] else held_out_f1(trial)


def held_out_f1(trial: dict) -> Interval:
    """A run's F1 in percent on the questions held out of its training data, without an interval."""
    return Interval(*[trial["held_out"]["f1"]] * 3)


def shares_held_out(record: dict) -> bool:
    """Whether its runs held out the same questions; those that are made from texts depend on how they are made."""
    return len({provenance["held_out"]["sha256"] for provenance in record["provenances"]}) == 1


def f1_by_point(record: dict, score: Callable[[dict], Interval] = trial_f1) -> dict[str, list[Interval]]:
    """F1 of each point's runs, points by name, numbers in names by their value."""
    points: dict[str, list[Interval]] = {}
    for trial in sorted(record["trials"], key=lambda trial: _by_name(trial["point"])):
        points.setdefault(trial["point"], []).append(score(trial))
    return points


def _by_name(point: str) -> list[str | float]:
    """Text and numbers in turn: "length=16" comes behind "length=8", and "7,505 questions" behind "32 questions"."""
    parts = re.split(r"(\d+(?:,\d{3})*(?:\.\d+)?)", point.casefold())
    return [float(part.replace(",", "")) if place % 2 else part for place, part in enumerate(parts)]


def over_seeds(runs: list[Interval]) -> Interval:
    """The mean of a point's runs: from the lowest to the highest of several, or with the interval over questions of one."""
    values = [run.value for run in runs]
    return Interval(mean(values), min(values), max(values)) if len(runs) > 1 else runs[0]


def f1_over_seeds(record: dict, score: Callable[[dict], Interval] = trial_f1) -> dict[str, Interval]:
    """The mean F1 of each point, and its range over seeds; points by name."""
    return {point: over_seeds(runs) for point, runs in f1_by_point(record, score).items()}


def gains_over(record: dict, reference: str, score: Callable[[dict], Interval] = held_out_f1) -> dict[str, list[float]]:
    """What each other point's runs have more F1, in points, than the reference's runs with the same seeds; points by name.

    Seeds share their start and order of training data, so that such a difference varies less than F1 itself.
    """
    of_reference = {trial["seed"]: score(trial).value for trial in record["trials"] if trial["point"] == reference}
    gains: dict[str, list[float]] = {}
    for trial in sorted(record["trials"], key=lambda trial: (_by_name(trial["point"]), trial["seed"])):
        if trial["point"] != reference and trial["seed"] in of_reference:
            gains.setdefault(trial["point"], []).append(score(trial).value - of_reference[trial["seed"]])
    return gains


def join_by_start(records: list[dict]) -> dict:
    """One record of several sweeps over starts and numbers of questions, to draw them together.

    Each trial gains a `start`, such as "normal", "pretrained: cloze" or "full fine-tuning", and its point is named after that and the
    number of questions it was trained on.
    """
    trials = []
    for record in records:
        for trial in record["trials"]:
            start = _start(record["config"], trial["changes"])
            trials.append({**trial, "start": start, "point": f"{start}, {trial['train_questions']:,} questions"})
    precisions = {record["config"]["precision"] for record in records}
    shared = precisions.pop() if len(precisions) == 1 else "auto"
    return {**records[0], "config": {**records[0]["config"], "precision": shared}, "trials": trials}


def f1_by_start(record: dict) -> dict[str, dict[int, Interval]]:
    """Of a record of `join_by_start`: F1 over seeds, by start and number of training questions."""
    runs: dict[str, dict[int, list[Interval]]] = {}
    for trial in record["trials"]:
        runs.setdefault(trial["start"], {}).setdefault(trial["train_questions"], []).append(trial_f1(trial))
    return {start: {count: over_seeds(found[count]) for count in sorted(found)} for start, found in runs.items()}


def _start(config: dict, changes: dict) -> str:
    method, init = changes.get("method", config["method"]), changes.get("prefix.init", config["prefix"]["init"])
    pretrained = "" if init in INITIALISERS else f"pretrained: {Path(init).name.partition('-seed-')[0]}"
    if method == "p-tuning-v2":
        return pretrained or init
    return METHODS[method].title + (", pretrained" if pretrained else "")
