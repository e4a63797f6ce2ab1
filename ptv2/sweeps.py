"""Sweeps: many training runs from one specification, and the one record that they leave. `ptv2.workers` runs them,
`ptv2.sweep_scores` says what they found.

A specification is a TOML file: what all runs have in common, and the points in which they differ.

    question = "How long does a prefix have to be?"   # for people
    seeds = [0, 1, 2]                 # every point is run with each; all points with the first seed come first
    metric = "f1"                     # or "exact_match", of the held-out questions
    evaluation = "questions.json"     # optional: the trained weights are scored on this, too
    [config]                          # fields of TrainingConfig; prefix.*, windows.* and pretraining.* are those of the configs in it
    train_data = ["embedded"]
    [grid]                            # the full product of these; or
    prefix.prefix_length = [16, 1, 64]
    [[points]]                        # points one by one; or
    name = "MLP"
    prefix.prefix_projection = true
    [search]                          # a space for Optuna's TPE sampler, with `trials`: how many points of it to try
    learning_rate = {low = 1e-3, high = 1e-1, log = true}
"""

import itertools
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from ptv2 import records
from ptv2.errors import InputError
from ptv2.features import WindowConfig
from ptv2.prefix import PrefixConfig
from ptv2.pretraining import PretrainingConfig
from ptv2.training import TrainingConfig

_NESTED = {"prefix": PrefixConfig, "windows": WindowConfig, "pretraining": PretrainingConfig}
_FIELDS = ("name", "question", "seeds", "metric", "evaluation", "trials", "config", "grid", "points", "search")


@dataclass(frozen=True)
class Point:
    """A way in which runs of a sweep differ from its config: a name, and the fields (dotted) with their values."""

    name: str
    changes: dict

    def key(self, seed: int) -> str:
        """The name of its run with a seed, also as a directory."""
        return f"{re.sub('[^A-Za-z0-9_.=+-]+', '-', self.name)}-seed-{seed}"


@dataclass(frozen=True)
class Sweep:
    """A specification as it was read; see the module's text."""

    name: str
    question: str
    seeds: tuple[int, ...]
    metric: str
    evaluation: str | None
    config: dict
    points: tuple[Point, ...]
    search: dict[str, dict]

    @property
    def base(self) -> dict:
        """The whole config that its runs share, points and seeds aside."""
        return {name: value for name, value in make_config(self.config, 0).to_dict().items() if name != "seed"}


def read_sweep(file: str | Path, changes: dict | None = None) -> Sweep:
    """Read a specification.

    Args:
        changes: values in place of the file's, by dotted name, such as {"seeds": [0], "config.max_steps": 20}: a small sweep and
            a large one are the same specification.

    Raises:
        InputError: it is missing or broken, or names a field or a value that training does not take.
    """
    path = Path(file)
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} could not be read as TOML: {error}.") from error
    for name, value in (changes or {}).items():
        *tables, last = name.split(".")
        table = spec
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"{path}: {name} can't be set, {part} is no table.")
        table[last] = value
    try:
        return _checked(path.stem, spec)
    except (InputError, TypeError, ValueError, KeyError, AttributeError) as error:  # a value of the wrong type fails in its own way
        raise InputError(f"{path}: {error}") from error


def _checked(name: str, spec: dict) -> Sweep:
    unknown = sorted(set(spec) - set(_FIELDS))
    if unknown:
        raise InputError(f"{unknown[0]} is no field of a sweep; those are {', '.join(_FIELDS)}.")
    seeds, metric = spec.get("seeds", [0]), spec.get("metric", "f1")
    if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {seeds}; give a list of different whole numbers.")
    if metric not in ("f1", "exact_match"):
        raise InputError(f'metric is "{metric}"; it must be "f1" or "exact_match".')
    ways = [way for way in ("grid", "points", "search") if way in spec]
    if len(ways) != 1:
        raise InputError(f"give one of [grid], [[points]] and [search], not {' and '.join(ways) or 'none'}.")
    search = _flat(spec.get("search", {}))
    if search and (len(seeds) > 1 or spec.get("trials", 0) < 1):
        raise InputError("a search takes one seed and a number of trials; run its winners with more seeds as [[points]].")
    if "trials" in spec and not search:
        raise InputError("trials is for a search alone; name fewer points or seeds, or stop with the command's --limit.")
    points = _grid(spec["grid"]) if "grid" in spec else _named(spec.get("points", []))
    config = _flat(spec.get("config", {}))
    for point in (*points, Point("", _first(search))):  # before the first run, not hours later
        for seed in seeds:
            make_config({**config, **point.changes}, seed)
    points = points or tuple(Point(f"trial {i}", {}) for i in range(spec["trials"]))
    keys = [point.key(seeds[0]) for point in points]
    if len(set(keys)) < len(keys):
        raise InputError(f"every point needs a name of its own; they are {', '.join(point.name for point in points)}.")
    evaluation = spec.get("evaluation") or None
    return Sweep(str(spec.get("name", name)), str(spec.get("question", "")), tuple(seeds), metric, evaluation, config, points, search)


def _flat(table: dict) -> dict:
    """{"prefix": {"prefix_length": 16}, "epochs": 1} to {"prefix.prefix_length": 16, "epochs": 1}."""
    flat = {}
    for name, value in table.items():
        flat.update({f"{name}.{inner}": part for inner, part in value.items()} if name in _NESTED else {name: value})
    return flat


def _grid(table: dict) -> tuple[Point, ...]:
    flat = _flat(table)
    products = itertools.product(*(value if isinstance(value, list) else [value] for value in flat.values()))
    chosen = [dict(zip(flat, values, strict=True)) for values in products]
    return tuple(Point(describe(changes), changes) for changes in chosen)


def _named(tables: list[dict]) -> tuple[Point, ...]:
    return tuple(Point(str(table["name"]), _flat({key: value for key, value in table.items() if key != "name"})) for table in tables)


def _first(search: dict[str, dict]) -> dict:
    """Some point of a search space."""
    return {name: space["choices"][0] if "choices" in space else space["low"] for name, space in search.items()}


def describe(changes: dict) -> str:
    """The values of a point as people read them: "prefix_length=16, init=zero"; of a directory its own name."""

    def shown(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else Path(str(value)).name

    return ", ".join(f"{name.rpartition('.')[2]}={shown(value)}" for name, value in changes.items())


def make_config(values: dict, seed: int) -> TrainingConfig:
    """A training config from dotted names.

    Raises:
        InputError: a name is unknown, or a value out of its range.
    """
    parts: dict[str, dict] = {"": {"seed": seed}, **{name: {} for name in _NESTED}}
    for name, value in values.items():
        holder, _, field = name.rpartition(".")
        known = {known.name for known in fields(_NESTED.get(holder, TrainingConfig))} - {"seed", *_NESTED}
        if holder not in parts or field not in known:
            raise InputError(f"{name} is no field of a training config that a point can set (seeds has a list of its own).")
        parts[holder][field] = value
    return TrainingConfig(**parts[""], **{name: config(**parts[name]) for name, config in _NESTED.items() if parts[name]})


def differences(config: dict, other: dict) -> list[str]:
    """Fields in which the configs of two sweeps differ; data and backbone may lie elsewhere on another machine: the runs hold hashes."""
    return [name for name in config if name not in ("train_data", "eval_data", "backbone") and other.get(name) != config[name]]


def trial_result(run: dict, evaluation: dict | None) -> dict:
    """What a sweep's record keeps of a run: scores, costs, its curve on held-out questions, and where it all comes from."""
    per_step = run["config"]["batch_size"] * run["config"]["gradient_accumulation"]
    scores = ("data", "data_sha256", "n", "exact_match", "f1")
    return {
        "held_out": {"exact_match": run["metrics"]["held_out_exact_match"], "f1": run["metrics"]["held_out_f1"]},
        "evaluation": {name: evaluation[name] for name in scores} if evaluation else None,
        "train_loss": next((entry["train_loss"] for entry in run["log_history"] if "train_loss" in entry), None),  # the mean, in nats
        "parameters": {name: run["parameters"][name] for name in ("trained", "backbone", "stored_bytes")},
        "train_questions": run["data"]["train"]["questions"],
        "windows_seen": run["steps"] * per_step,
        "seconds": run["wall_seconds"],
        "peak_memory_mib": run["peak_memory_mib"],
        "curve": [[entry["step"] * per_step, round(entry["eval_f1"], 3)] for entry in run["log_history"] if "eval_f1" in entry],
        "command": run["command"],
        "finished": run["finished"],
        "provenance": {
            "held_out": run["data"]["held_out"],
            **{name: run[name] for name in ("backbone", "init", "dtype", "versions", "git_commit", "machine") if name in run},
        },
    }


def sweep_record(sweep: Sweep, trials: list[dict], command: str) -> dict:
    """The record of a sweep's finished runs; each is {point, changes, seed, **trial_result(...)}."""
    named = {"name": sweep.name, "question": sweep.question, "metric": sweep.metric, "config": sweep.base}
    return _with_provenance_once({**named, **records.provenance(command), "trials": trials})


def _with_provenance_once(record: dict) -> dict:
    """What many runs have in common (versions, machine, ...) stands once, in `provenances`; a run holds its index there."""
    distinct: list[dict] = []
    trials = []
    for trial in record["trials"]:
        if trial["provenance"] not in distinct:
            distinct.append(trial["provenance"])
        trials.append({**trial, "provenance": distinct.index(trial["provenance"])})
    return {**record, "trials": trials, "provenances": distinct}


def merge_records(parts: list[dict]) -> dict:
    """One record of several of the same sweep, as exported on different machines; the first one's runs win, and come first.

    Raises:
        InputError: they are of different sweeps, or were scored on different questions.
    """
    first = parts[0]
    trials: dict[tuple[str, int], dict] = {}
    for part in parts:
        different = differences(first["config"], part["config"])
        if part["name"] != first["name"] or different:
            what = different[0] if different else "name"
            raise InputError(f"The records of {first['name']} and {part['name']} differ in {what}; only parts of one sweep can be merged.")
        for trial in part["trials"]:
            whole = {**trial, "provenance": part["provenances"][trial["provenance"]]}
            trials.setdefault((trial["point"], trial["seed"]), whole)
    merged = list(trials.values())
    scored_on = {_scored_on(trial, first["config"]) for trial in merged}
    if len(scored_on) > 1:
        raise InputError(f"The runs of {first['name']} were not all scored on the same questions; they can't be compared.")
    return _with_provenance_once({**first, "trials": merged})


def _scored_on(trial: dict, config: dict) -> tuple:
    """Hashes of the backbone, of the evaluation's questions, and of the held-out ones.

    Each objective of pretraining makes its own questions of the held-out texts: there the evaluation's alone count, if it has one.
    """
    provenance, evaluation = trial["provenance"], trial["evaluation"]
    makes_questions = config["pretraining"] or any(name.startswith("pretraining.") for name in trial["changes"])
    held_out = None if evaluation and makes_questions else provenance["held_out"]["sha256"]
    return provenance["backbone"]["sha256"], evaluation and evaluation["data_sha256"], held_out


def read_sweep_record(file: str | Path) -> dict:
    """A sweep's record.

    Raises:
        InputError: it is missing or none.
    """
    record = records.read_json(Path(file))
    if not isinstance(record.get("trials"), list):
        raise InputError(f"{file} is no record of a sweep.")
    return record
