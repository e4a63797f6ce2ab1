"""The notebook suite: what a notebook reproduces, the runner, its report, and the notebooks as they are stored."""

import json
from types import SimpleNamespace

import IPython
import numpy as np
import pytest
import torch

from ptv2.errors import InputError
from ptv2.notebooks import CHECK_MIME, Reproduction


@pytest.fixture
def results(tmp_path):
    """A folder of records in which 01_tiny reached 10.5 and counted 1234 with a prefix length of 16 on some.json."""
    record = {"values": {"F1": 10.5, "count": 1234}, "parameters": {"prefix_length": 16, "train_data": ["some.json"]}}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "quick.json").write_text(json.dumps({"01_tiny": record}))
    return tmp_path


@pytest.fixture
def shown(results, displayed):
    """A function that makes one check and returns what it displays, and what it returns."""

    def check(name, value, tolerance, notebook="01_tiny", profile="quick"):
        displayed.clear()
        passed = Reproduction(notebook, profile, results).check(name, value, tolerance)
        ((data, _),) = displayed
        assert data[CHECK_MIME]["passed"] is passed
        return data, passed

    return check


@pytest.mark.parametrize(
    ("value", "tolerance", "passed"),
    [
        (10.5, 0, True),
        (11.0, 0.5, True),
        (11.01, 0.5, False),
        (9.9, 0.5, False),
        (torch.tensor(10.75), 0.25, True),
        (np.float64(9), 1, False),
    ],
)
def test_a_value_passes_within_its_tolerance(shown, value, tolerance, passed):
    data, returned = shown("F1", value, tolerance)
    assert returned is passed
    assert data[CHECK_MIME] == {"name": "F1", "recorded": 10.5, "new": float(value), "tolerance": tolerance, "passed": passed}
    assert data["text/plain"].endswith("pass" if passed else "FAIL")
    assert "recorded 10.5" in data["text/plain"]


def test_counts_are_compared_and_shown_in_full(shown):
    data, passed = shown("count", np.int64(1235), 0)
    assert passed is False
    assert data["text/plain"] == "count: 1,235 (recorded 1,234, tolerance 0): FAIL"


@pytest.mark.parametrize("place", [{"name": "other"}, {"name": "F1", "notebook": "02_tiny"}, {"name": "F1", "profile": "full"}])
def test_without_a_record_a_value_is_new(shown, place):
    data, passed = shown(value=1.0, tolerance=0, **place)
    assert passed is None
    assert data["text/plain"].endswith("new")


def test_a_value_recorded_under_other_parameters_is_not_compared(shown, monkeypatch):
    here = {"prefix_length": 64, "train_data": ["/elsewhere/some.json"]}
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=here))
    data, passed = shown("F1", 10.5, 0)
    assert passed is None
    assert "recorded 10.5 with prefix_length 16)" in data["text/plain"]  # where the data lies is no difference
    assert shown("other", 1.0, 0)[0]["text/plain"].endswith("new")
    here["prefix_length"] = 16
    assert shown("F1", 10.5, 0)[1] is True


def test_what_cannot_be_compared_is_refused(results):
    with pytest.raises(InputError, match="F1 is nan"):
        Reproduction("01_tiny", "quick", results).check("F1", float("nan"), 1)
    with pytest.raises(InputError, match="must be 0 or more"):
        Reproduction("01_tiny", "quick", results).check("F1", 1.0, -1)
