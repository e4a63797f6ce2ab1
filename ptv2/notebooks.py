"""The notebook suite: values that a notebook reproduces, and the runner that executes the notebooks and collects them."""

import html
import math
from pathlib import Path

from ptv2 import records
from ptv2.errors import InputError

CHECK_MIME = "application/vnd.ptv2.check+json"
# Where results go and come from; every other parameter can change a value.
_PLACES = ("output_dir", "results_dir")


class Reproduction:
    """What a notebook recomputes, set beside what was recorded under the same profile and parameters.

    Args:
        notebook: its name without suffix, such as "03_train_on_squad".
        profile: whose record is compared with, RESULTS_DIR/notebooks/PROFILE.json.
        results_dir: the folder of records.
    """

    def __init__(self, notebook: str, profile: str, results_dir: str | Path):
        self.notebook = notebook
        path = Path(results_dir) / "notebooks" / f"{profile}.json"
        recorded = records.read_json(path).get(notebook, {}) if path.is_file() else {}
        self._values = recorded.get("values", {})
        self._changed = _changed(recorded.get("parameters", {}))

    def check(self, name: str, value, tolerance: float) -> bool | None:
        """Compare a value with the recorded one, and show both in one line.

        The line is also left in the cell's output as JSON (`application/vnd.ptv2.check+json`: name, recorded, new, tolerance,
        passed), which the runner collects.

        Args:
            value: a number, or an array or tensor of one.
            tolerance: the largest absolute difference that passes; 0 for what is exact.

        Returns:
            Whether it is within the tolerance; None where no value is recorded, or where it was recorded under other parameters.

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
        return passed

    def _show(self, check: dict) -> None:
        from IPython.display import display  # the notebooks extra

        if check["recorded"] is None:
            verdict, beside = "new", "nothing recorded"
        elif check["passed"] is None:
            verdict, beside = "not compared", f"recorded {number(check['recorded'])} with {self._changed}"
        else:
            verdict = "pass" if check["passed"] else "FAIL"
            beside = f"recorded {number(check['recorded'])}, tolerance {number(check['tolerance'])}"
        line = f"{check['name']}: {number(check['new'])} ({beside})"
        page = f"<div>{html.escape(line)}: <strong>{verdict}</strong></div>"
        display({"text/plain": f"{line}: {verdict}", "text/html": page, CHECK_MIME: check}, raw=True)


def number(value: float) -> str:
    """A number as people read it: counts in full with separators, others to five significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def plain(value):
    """A parameter without the folders in front of file and hub names: the same data may lie elsewhere."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def _changed(recorded: dict) -> str:
    """The recorded parameters that differ from those of the running notebook: "prefix_length 16, seed 0"; else ""."""
    try:
        from IPython import get_ipython
    except ImportError:
        return ""
    shell = get_ipython()
    here = shell.user_ns if shell else {}
    return ", ".join(f"{name} {value}" for name, value in recorded.items() if name in here and plain(here[name]) != value)
