"""The notebook suite: which notebooks there are, their typed parameters, and the values that they reproduce."""

import ast
import html
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ptv2 import records
from ptv2.errors import InputError

CHECK_MIME = "application/vnd.ptv2.check+json"
# Parameters that say where things lie; every other one can change a value.
PLACES = ("output_dir", "results_dir")
# Parameters that every notebook has. Those that the runner itself sets are `profile` and `output_dir`.
COMMON = ("profile", "seed", *PLACES)
_KINDS = {"bool": bool, "int": int, "float": float, "str": str, "list": list}


@dataclass(frozen=True)
class Planned:
    """A notebook that is about to run, with all its parameters.

    Args:
        path: of the notebook.
        parameters: name to value: the notebook's own, then the profile's, then those of the command line.
    """

    path: Path
    parameters: dict[str, object]

    @property
    def name(self) -> str:
        return self.path.stem


def find_notebooks(folder: Path, only: list[str] | None = None) -> list[Path]:
    """The suite in its order: FOLDER/NN_name.ipynb.

    Args:
        only: beginnings of names ("03"); a notebook is taken if it matches one of them.

    Raises:
        InputError: there is none, or none for one of the beginnings.
    """
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise InputError(f"No notebook NN_name.ipynb lies in {folder}; give the suite's folder with --notebooks-dir.")
    for start in only or ():
        if not any(path.stem.startswith(start) for path in found):
            raise InputError(f"No notebook begins with {start}; choose from {', '.join(path.stem for path in found)}.")
    return [path for path in found if not only or path.stem.startswith(tuple(only))]


def read_profile(folder: Path, profile: str) -> dict[str, dict]:
    """The parameters that a profile changes, by notebook, from FOLDER/profiles.toml; `quick` may be left out there.

    Raises:
        InputError: the file is not TOML, lacks the profile, or names a notebook that does not exist.
    """
    path = folder / "profiles.toml"
    try:
        profiles = {"quick": {}, **tomllib.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {"quick": {}}
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}.") from error
    if profile not in profiles:
        raise InputError(f"{path} has no profile {profile}; choose from {', '.join(profiles)}.")
    strangers = set(profiles[profile]) - {notebook.stem for notebook in find_notebooks(folder)}
    if strangers:
        raise InputError(f"{path}: profile {profile} names {', '.join(sorted(strangers))}, which is no notebook in {folder}.")
    return profiles[profile]


def plan(folder: Path, profile: str, only: list[str] | None = None, given: dict[str, str] | None = None) -> list[Planned]:
    """What a profile runs, every parameter parsed and checked against the notebook's parameters cell.

    Args:
        given: parameters as typed on the command line; each goes to all chosen notebooks that have it.

    Raises:
        InputError: a parameter is unknown, has the wrong type, or is not to be given.
    """
    given, values = given or {}, read_profile(folder, profile)
    for name in ("profile", "output_dir"):
        if name in given:
            raise InputError(f"The parameter {name} is set by --{name.replace('_', '-')}; leave it out of -p.")
    planned, unused = [], dict(given)
    for path in find_notebooks(folder, only):
        declared = declared_parameters(path)
        parameters = {name: default for name, (_, default) in declared.items()}
        for name, value in {**values.get(path.stem, {}), "profile": profile}.items():
            parameters[name] = _checked(path.stem, name, value, declared)
        for name in given.keys() & declared.keys():
            unused.pop(name, None)
            parameters[name] = _checked(path.stem, name, _parsed(given[name], declared[name][0]), declared)
        planned.append(Planned(path, parameters))
    if unused:
        names = sorted({name for notebook in planned for name in notebook.parameters} - {"profile", "output_dir"})
        raise InputError(f"No chosen notebook has a parameter {', '.join(unused)}; choose from {', '.join(names)}.")
    return planned


def declared_parameters(path: Path) -> dict[str, tuple[str, object]]:
    """A notebook's parameters, name to (type, default), as its parameters cell declares them: `seed: int = 0`.

    Raises:
        InputError: a type is none of bool, int, float, str and list, a default is no literal of it, a common one is
            missing, or the file is no notebook.
    """
    from papermill import inspect_notebook  # the notebooks extra

    try:
        inspected = inspect_notebook(path)
    except ValueError as error:
        raise InputError(f"{path} could not be read: {error}") from error
    declared = {}
    for name, found in inspected.items():
        kind = found["inferred_type_name"]
        if kind.partition("[")[0] not in _KINDS:
            raise InputError(f"{path.name}: declare {name} as one of {', '.join(_KINDS)}, not {kind}.")
        try:
            declared[name] = (kind, ast.literal_eval(found["default"]))
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{path.name}: the default of {name} must be a plain value, not {found['default']}.") from error
        _checked(path.stem, name, declared[name][1], declared)
    missing = [name for name in COMMON if name not in declared]
    if missing:
        raise InputError(f"{path.name}: its parameters cell lacks {', '.join(missing)}.")
    return declared


def _checked(notebook: str, name: str, value: object, declared: dict[str, tuple[str, object]]) -> object:
    """The value, if the notebook has such a parameter and the value is of its type; an int may stand for a float."""
    if name not in declared:
        raise InputError(f"{notebook} has no parameter {name}; choose from {', '.join(declared)}.")
    kind, default = declared[name]
    outer, _, inner = kind.rstrip("]").partition("[")
    if not _is(value, outer):
        raise InputError(f"{notebook}: {name} must be {kind}, not {value!r}.")
    if outer == "list":
        kinds = [inner] if inner else sorted({type(part).__name__ for part in default})
        if kinds and not all(any(_is(part, each) for each in kinds) for part in value):
            raise InputError(f"{notebook}: {name} must be a list of {' or '.join(kinds)}, not {value!r}.")
    return float(value) if outer == "float" else value


def _is(value: object, kind: str) -> bool:
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is _KINDS[kind]


def _parsed(text: str, kind: str) -> object:
    """A value as typed: a str as it stands; others as JSON (true, 0.5, [1, 2]), where a single word is a list of one."""
    if kind == "str":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return [value] if kind.startswith("list") and not isinstance(value, list) else value


class Reproduction:
    """What a notebook recomputes, set beside what was recorded under the same profile and parameters.

    Args:
        notebook: its name without suffix, such as "03_train_on_squad".
        profile: whose record is compared with, RESULTS_DIR/notebooks/PROFILE.json.
        results_dir: the folder of records.
    """

    def __init__(self, notebook: str, profile: str, results_dir: str | Path):
        self.notebook = notebook
        path = records_path(results_dir, profile)
        recorded = records.read_json(path).get(notebook, {}) if path.is_file() else {}
        self._values = recorded.get("values", {})
        self._changed = _changed(recorded.get("parameters", {}))

    def check(self, name: str, value, tolerance: float) -> None:
        """Compare a value with the recorded one, and show both in one line.

        The line is also left in the cell's output as JSON (`application/vnd.ptv2.check+json`: name, recorded, new, tolerance,
        passed), which the runner collects; `passed` is null where no value is recorded, or under other parameters.

        Args:
            value: a number, or an array or tensor of one.
            tolerance: the largest absolute difference that passes; 0 for what is exact.

        Raises:
            InputError: the value is not finite, or the tolerance is negative.
        """
        new = value.item() if hasattr(value, "item") else value
        if not math.isfinite(new):
            raise InputError(f"{self.notebook}: {name} is {new}; only finite numbers can be reproduced.")
        if not tolerance >= 0:
            raise InputError(f"{self.notebook}: the tolerance of {name} is {tolerance}; it must be 0 or more.")
        recorded = self._values.get(name)
        passed = None if recorded is None or self._changed else abs(new - recorded) <= tolerance
        self._show({"name": name, "recorded": recorded, "new": new, "tolerance": tolerance, "passed": passed})

    def _show(self, check: dict) -> None:
        from IPython.display import display  # the notebooks extra

        if check["recorded"] is None:
            beside = "nothing recorded"
        elif check["passed"] is None:
            beside = f"recorded {number(check['recorded'])} with {self._changed}"
        else:
            beside = f"recorded {number(check['recorded'])}, tolerance {number(check['tolerance'])}"
        line = f"{check['name']}: {number(check['new'])} ({beside})"
        page = f"<div>{html.escape(line)}: <strong>{verdict(check)}</strong></div>"
        display({"text/plain": f"{line}: {verdict(check)}", "text/html": page, CHECK_MIME: check}, raw=True)


def verdict(check: dict) -> str:
    """What a check came to, in a word or two."""
    if check["recorded"] is None:
        return "new"
    return {None: "not compared", True: "pass", False: "FAIL"}[check["passed"]]


def number(value: float) -> str:
    """A number as people read it: counts in full with separators, others to five significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def records_path(results_dir: str | Path, profile: str) -> Path:
    """Where a profile's values are recorded."""
    return Path(results_dir) / "notebooks" / f"{profile}.json"


def deciding(parameters: dict[str, object]) -> dict[str, object]:
    """The parameters that decide a result, files and hub names without the folders before them: data may lie elsewhere."""
    return {name: _last_part(value) for name, value in parameters.items() if name not in PLACES}


def _last_part(value: object) -> object:
    if isinstance(value, list):
        return [_last_part(part) for part in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def _changed(recorded: dict) -> str:
    """The recorded parameters that differ from those of the running notebook: "prefix_length 16, seed 0"; else ""."""
    try:
        from IPython import get_ipython
    except ImportError:
        return ""
    shell = get_ipython()
    here = deciding(shell.user_ns) if shell else {}
    return ", ".join(f"{name} {value}" for name, value in recorded.items() if name in here and here[name] != value)
