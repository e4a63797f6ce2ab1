"""The notebook suite: what a notebook reproduces, the runner, its report, and the notebooks as they are stored."""

import ast
import contextlib
import io
import json
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import IPython
import nbformat
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ptv2.cli import main
from ptv2.errors import InputError
from ptv2.notebook_report import formula, notebook_body
from ptv2.notebook_runner import collect_checks
from ptv2.notebooks import CHECK_MIME, Reproduction, declared_parameters, find_notebooks, plan


@pytest.fixture
def results(tmp_path):
    """A folder of records in which 01_tiny reached 10.5 and counted 1234 with a prefix length of 16 on some.json."""
    record = {"values": {"F1": 10.5, "count": 1234}, "parameters": {"prefix_length": 16, "train_data": ["some.json"]}}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "quick.json").write_text(json.dumps({"01_tiny": record}))
    return tmp_path


@pytest.fixture
def shown(results, displayed):
    """A function that makes one check and returns what it displays, and whether it passed."""

    def check(name, value, tolerance, notebook="01_tiny", profile="quick"):
        displayed.clear()
        Reproduction(notebook, profile, results).check(name, value, tolerance)
        ((data, _),) = displayed
        return data, data[CHECK_MIME]["passed"]

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


COMMON = 'profile: str = "quick"\nseed: int = 0\noutput_dir: str = ""\nresults_dir: str = "../results"\n'
OWN = (
    'prefix_length: int = 16  # positions\nrate: float = 0.1\ntrain_data: list = ["embedded"]\nsizes: list[int] = []\nbf16: bool = False\n'
)


def write_notebook(folder: Path, name: str, *sources: str, parameters: str = COMMON + OWN) -> Path:
    """A notebook of a title, a parameters cell and cells of code."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        new_markdown_cell("# The title\n\nWhere $a = \\frac{1}{2}$; see [the next](02_breaks.ipynb)."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, sources),
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_parameters_come_from_the_cell_then_the_profile_then_the_command_line(tmp_path):
    write_notebook(tmp_path, "01_a")
    write_notebook(tmp_path, "02_b", parameters=COMMON)
    (tmp_path / "profiles.toml").write_text("[full.01_a]\nprefix_length = 32\nrate = 1\n")
    first, second = plan(tmp_path, "full", given={"prefix_length": "64", "train_data": "squad.json", "sizes": "[1, 2]", "bf16": "true"})
    assert (first.name, second.name) == ("01_a", "02_b")
    assert first.parameters == {
        "profile": "full", "seed": 0, "output_dir": "", "results_dir": "../results", "prefix_length": 64, "rate": 1.0,
        "train_data": ["squad.json"], "sizes": [1, 2], "bf16": True,
    }  # fmt: skip
    assert "prefix_length" not in second.parameters
    assert plan(tmp_path, "quick")[0].parameters["prefix_length"] == 16


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prefix": "1"}, "No chosen notebook has a parameter prefix; choose from bf16, prefix_length, rate, results_dir"),
        ({"prefix_length": "sixty"}, "01_a: prefix_length must be int, not 'sixty'"),
        ({"prefix_length": "1.5"}, "01_a: prefix_length must be int, not 1.5"),
        ({"prefix_length": "true"}, "01_a: prefix_length must be int, not True"),
        ({"rate": "true"}, "01_a: rate must be float, not True"),
        ({"bf16": "1"}, "01_a: bf16 must be bool, not 1"),
        ({"train_data": "[1]"}, r"01_a: train_data must be a list of str, not \[1\]"),
        ({"sizes": "[1.5]"}, r"01_a: sizes must be a list of int, not \[1.5\]"),
        ({"output_dir": "here"}, "The parameter output_dir is set by --output-dir"),
    ],
)
def test_a_wrong_parameter_is_named_in_one_sentence(tmp_path, capsys, given, sentence):
    write_notebook(tmp_path, "01_a")
    with pytest.raises(InputError, match=sentence):
        plan(tmp_path, "quick", given=given)
    words = [word for pair in given.items() for word in ("-p", *pair)]
    assert main(["notebooks", "--notebooks-dir", str(tmp_path), "--output-dir", str(tmp_path / "run"), *words]) == 2
    assert re.fullmatch(rf"ptv2: .*{sentence}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("profiles", "profile", "sentence"),
    [
        ("[full.09_gone]\n", "full", "profile full names 09_gone, which is no notebook"),
        ("[full.01_a]\nlength = 3\n", "full", "01_a has no parameter length"),
        ("[full.01_a]\nprefix_length = 'x'\n", "full", "01_a: prefix_length must be int, not 'x'"),
        ("[full]\n", "slow", "has no profile slow; choose from quick, full"),
        ("full\n", "full", "is not TOML"),
    ],
)
def test_a_wrong_profile_is_named_in_one_sentence(tmp_path, profiles, profile, sentence):
    write_notebook(tmp_path, "01_a")
    (tmp_path / "profiles.toml").write_text(profiles)
    with pytest.raises(InputError, match=sentence):
        plan(tmp_path, profile)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (COMMON.replace("seed: int = 0\n", ""), "its parameters cell lacks seed"),
        (COMMON + "length = 3\n", "declare length as one of bool, int, float, str, list, not None"),
        (COMMON + "length: int = 3.5\n", "01_a: length must be int, not 3.5"),
        (COMMON + "length: int = 3 * 5\n", "the default of length must be a plain value, not 3 [*] 5"),
    ],
)
def test_a_parameters_cell_is_held_to_its_form(tmp_path, parameters, sentence):
    path = write_notebook(tmp_path, "01_a", parameters=parameters)
    with pytest.raises(InputError, match=sentence):
        declared_parameters(path)


def test_only_chooses_by_the_beginning_of_names(tmp_path):
    for name in ("01_a", "02_b", "03_c"):
        write_notebook(tmp_path, name)
    assert [path.stem for path in find_notebooks(tmp_path, ["03", "01"])] == ["01_a", "03_c"]
    with pytest.raises(InputError, match="No notebook begins with 04; choose from 01_a, 02_b, 03_c"):
        find_notebooks(tmp_path, ["01", "04"])
    with pytest.raises(InputError, match=r"No notebook NN_name.ipynb lies in"):
        find_notebooks(tmp_path / "solutions")


RANDOM = """import numpy as np
from ptv2.notebooks import Reproduction
reproduced = Reproduction("01_works", profile, results_dir)
reproduced.check("a random number", np.random.default_rng(seed).random(), 1e-6)
reproduced.check("prefix length", prefix_length, 0)"""
NOISY = """import os, sys
print("before")
print("a warning", file=sys.stderr, flush=True)
print("in", os.getcwd(), "with", os.environ["OMP_NUM_THREADS"])
1 + 1"""
FIGURE = """from matplotlib import pyplot as plt
from ptv2.plots import show
figure, axes = plt.subplots()
axes.plot([1, 2])
show(figure, "a_line", [1, 2], output_dir)"""
DIFFERS = """from ptv2.notebooks import Reproduction
Reproduction("03_differs", profile, results_dir).check("F1", 12.0, 0.5)"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of a notebook that works, one that breaks, one that reproduces another value, one that draws and one whose kernel dies."""
    root = tmp_path_factory.mktemp("suite")
    notebooks, results = root / "notebooks", root / "results" / "notebooks"
    write_notebook(notebooks, "01_works", RANDOM, NOISY)
    write_notebook(notebooks, "02_breaks", "assert prefix_length == 1, 'of length 16'", "print('never')")
    write_notebook(notebooks, "03_differs", DIFFERS)
    write_notebook(notebooks, "04_draws", FIGURE)
    write_notebook(notebooks, "05_dies", "import os\nos.kill(os.getpid(), 9)")
    write_notebook(notebooks / "solutions", "01_works", "import os\nprint(os.getcwd())", parameters="1 + 1")
    write_notebook(notebooks / "solutions", "04_draws", "raise ValueError", parameters="1 + 1")
    results.mkdir(parents=True)
    (results / "quick.json").write_text(json.dumps({"03_differs": {"values": {"F1": 13.0}, "parameters": {}}, "09_old": {"values": {}}}))
    return root


def run(root: Path, *words: str) -> int:
    return main(["notebooks", "--notebooks-dir", str(root / "notebooks"), "--output-dir", str(root / "run"), *words])


@pytest.fixture(scope="module")
def finished(suite):
    """The suite after `--jobs 2 --record --store`: its folder, exit status and output, and the sources as they were."""
    sources = {path.stem: path.read_text() for path in sorted((suite / "notebooks").glob("*.ipynb"))}
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = run(suite, "--jobs", "2", "--record", "--store")
    return SimpleNamespace(root=suite, status=status, stdout=stdout.getvalue(), stderr=stderr.getvalue(), sources=sources)


def test_a_failing_notebook_stops_nothing_and_shows_in_the_exit_status(finished):
    assert finished.status == 1
    outcomes = {path.stem: json.loads(path.read_text()) for path in (finished.root / "run").glob("0*.json")}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "01_works": "finished", "02_breaks": "failed", "03_differs": "finished", "04_draws": "finished",
        "05_dies": "failed",
    }  # fmt: skip
    assert outcomes["02_breaks"]["error"] == "AssertionError in cell 3: of length 16"
    assert outcomes["05_dies"]["error"] == "DeadKernelError: Kernel died"
    kept = (finished.root / "run" / "02_breaks.ipynb").read_text()
    assert "AssertionError" in kept
    lines = finished.stdout.splitlines()
    assert lines[0] == "02_breaks failed: AssertionError in cell 3: of length 16"
    assert lines[1] == "05_dies failed: DeadKernelError: Kernel died"
    assert lines[2] == "03_differs did not reproduce F1: 12, recorded 13, tolerance 0.5"
    assert lines[3] == f"Report: {finished.root / 'run' / 'report.html'}"
    assert lines[4] == "3 of 5 notebooks finished; 0 values reproduced, 1 not, 2 not compared."


def test_notebooks_run_in_their_folder_and_share_the_cores(finished):
    executed = nbformat.read(finished.root / "run" / "01_works.ipynb", 4)
    text = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", ()))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, os.cpu_count() // 2)))
    assert f"in {finished.root.resolve() / 'notebooks'} with {threads}\n" in text
    figures = finished.root / "run" / "figures" / "04_draws"
    assert {file.name for file in figures.iterdir()} == {"a_line.svg", "a_line.png", "a_line.json"}


def test_the_record_holds_values_and_provenance_of_finished_notebooks_only(finished):
    record = json.loads((finished.root / "results" / "notebooks" / "quick.json").read_text())
    assert list(record) == ["01_works", "03_differs", "04_draws", "09_old"]  # those of other notebooks stay
    entry = record["01_works"]
    assert entry["values"] == {"a random number": np.random.default_rng(0).random(), "prefix length": 16}
    assert entry["seed"] == 0
    assert entry["parameters"]["train_data"] == ["embedded"]
    assert "output_dir" not in entry["parameters"]
    assert entry["command"] == "ptv2 notebooks --profile quick"
    assert {"date", "versions", "git_commit", "machine", "seconds"} <= entry.keys()
    assert record["03_differs"]["values"] == {"F1": 12.0}


def test_outputs_are_stored_cleaned_where_all_went_well(finished):
    notebooks = finished.root / "notebooks"
    for name in ("02_breaks", "03_differs"):
        assert (notebooks / f"{name}.ipynb").read_text() == finished.sources[name]
    stored = nbformat.read(notebooks / "01_works.ipynb", 4)
    before = nbformat.reads(finished.sources["01_works"], 4)
    assert [(cell.id, cell.source) for cell in stored.cells] == [(cell.id, cell.source) for cell in before.cells]
    assert flaws(notebooks / "01_works.ipynb") == []
    noisy = stored.cells[3]
    assert [output.output_type for output in noisy.outputs] == ["stream", "execute_result"]
    assert noisy.outputs[0].text.startswith("before\nin notebooks with ")  # relative to the repository, one stream
    assert flaws(notebooks / "solutions" / "01_works.ipynb") == []
    solution = nbformat.read(notebooks / "solutions" / "01_works.ipynb", 4)
    assert solution.cells[2].outputs[0].text == "notebooks/solutions\n"
    assert "04_draws.ipynb is not stored: ValueError in cell 2" in finished.stderr
    drawn = nbformat.read(notebooks / "04_draws.ipynb", 4).cells[2].outputs
    assert [set(output.data) for output in drawn] == [{"image/png", "text/plain"}]


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    page = (finished.root / "run" / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)|https?://(?!www\.w3\.org/1998/Math/MathML)", page)
    assert page.count("data:image/png;base64,") == 2  # in the gallery and in the notebook
    for notebook in ("01_works", "02_breaks", "03_differs", "04_draws"):
        assert f'<section class="notebook" id="{notebook}">' in page
    assert "<mfrac>" in page
    assert '<a href="#02_breaks">the next</a>' in page
    row = re.search(r"<tr>\s*<td>F1</td>.*?</tr>", page, re.S).group()
    assert re.findall(r">([^<>\n]+)<", row) == ["F1", "13", "12", "0.5", "FAIL", "03_differs"]
    assert "<pre>a warning" not in page
    assert "AssertionError" in page
    assert str(finished.root) not in re.sub(r"in \S+ with", "", page.split("injected-parameters")[0])


def test_the_same_seed_gives_the_same_numbers_and_another_run_leaves_the_rest(finished, capsys):
    before = json.loads((finished.root / "run" / "01_works.json").read_text())["checks"]
    assert run(finished.root, "--only", "01") == 0  # now there is a record
    assert "1 of 1 notebooks finished; 2 values reproduced, 0 not, 0 not compared." in capsys.readouterr().out
    again = json.loads((finished.root / "run" / "01_works.json").read_text())["checks"]
    assert [check["new"] for check in again] == [check["new"] for check in before]
    assert 'id="03_differs"' in (finished.root / "run" / "report.html").read_text()
    assert run(finished.root, "--only", "01", "-p", "prefix_length", "64") == 0
    assert "0 values reproduced, 0 not, 2 not compared." in capsys.readouterr().out
    checks = json.loads((finished.root / "run" / "01_works.json").read_text())["checks"]
    assert checks[1] == {"name": "prefix length", "recorded": 16, "new": 64, "tolerance": 0, "passed": None}


def test_only_the_quick_profile_as_it_is_can_be_stored(tmp_path, capsys):
    write_notebook(tmp_path / "notebooks", "01_a")
    assert run(tmp_path, "--store", "-p", "seed", "1") == 2
    assert "--store keeps the outputs of the quick profile" in capsys.readouterr().err
    assert run(tmp_path, "--jobs", "0") == 2


def test_formulas_that_cannot_be_shown_are_named():
    assert formula(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "block").count("<mtr>") == 2
    with pytest.raises(InputError, match=r"formula .unknown x cannot be turned"):
        formula(r"\unknown x", "inline")


# The suite itself. Everything below holds for whatever notebooks there are.

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((REPOSITORY / "notebooks" / "solutions").glob("*.ipynb"))
PROFILES = list(tomllib.loads((REPOSITORY / "notebooks" / "profiles.toml").read_text()))
LOCAL_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|mnt|var|Users|private)/\w")
CLOCK = re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d|\b\d\d:\d\d:\d\d\b")


def flaws(path: Path) -> list[str]:
    """What a stored notebook must not hold, or lacks."""
    notebook, found = nbformat.read(path, 4), []
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    text = json.dumps([[output.get("text"), {k: v for k, v in output.get("data", {}).items() if k != "image/png"}] for output in outputs])
    if set(notebook.metadata) != {"kernelspec", "language_info"} or any(set(cell.metadata) - {"tags"} for cell in notebook.cells):
        found.append("metadata other than the kernel's name and the cells' tags")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)) or not outputs:
        found.append("not the outputs of one whole run")
    if any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs):
        found.append("an error or stderr")
    for what, pattern in {"a path of this machine": LOCAL_PATH, "a time": CLOCK, "a progress bar": re.compile(r"it/s\]|█")}.items():
        if hit := pattern.search(text):
            found.append(f"{what}: {text[max(0, hit.start() - 40) : hit.end() + 40]}")
    if path.stat().st_size > 600_000:
        found.append("more than 600 kB")
    return found


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stored_notebooks_hold_the_clean_outputs_of_one_run(path):
    assert flaws(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_profile_fits_the_parameters_cell(path):
    cells = nbformat.read(path, 4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    declared = declared_parameters(path)
    assigned = [line.target.id for line in ast.parse(cell.source).body]  # plain annotated assignments, nothing else
    assert list(declared) == assigned
    for profile in PROFILES:
        (planned,) = plan(path.parent, profile, [path.stem])
        assert planned.parameters.keys() == declared.keys()
        assert planned.parameters["profile"] == profile
        assert not any(LOCAL_PATH.search(json.dumps(value)) for value in planned.parameters.values())
    defaults = {name: default for name, (_, default) in declared.items()}
    assert {"profile": "quick", "seed": 0, "output_dir": "", "results_dir": "../results"}.items() <= defaults.items()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_title_and_closes_with_findings_and_three_exercises_that_are_solved(path):
    cells = nbformat.read(path, 4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    sections = re.split(r"^## ", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), flags=re.M)
    headings = [section.splitlines()[0] for section in sections]
    found, exercises = headings.index("What was found"), headings.index("Exercises")
    assert len(sections) - 3 <= found < exercises  # at most references follow
    assert len(re.findall(r"^\d\. ", sections[exercises], re.M)) == 3
    assert (path.parent / "solutions" / path.name) in SOLUTIONS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_formula_can_be_shown_in_the_report(path):
    body = notebook_body(nbformat.read(path, 4))
    assert not re.search(r"<p>[^<]*(?:\$\$|\\frac|\\begin)", body)


def test_every_profile_names_notebooks_that_exist():
    for profile in PROFILES:
        assert plan(REPOSITORY / "notebooks", profile)
    assert set(PROFILES) >= {"full"}


def test_recorded_values_are_those_that_the_stored_notebooks_compare_with():
    path = REPOSITORY / "results" / "notebooks" / "quick.json"
    recorded = json.loads(path.read_text())
    for notebook in NOTEBOOKS:
        checks = collect_checks(nbformat.read(notebook, 4))
        names = [check["name"] for check in checks]
        assert len(set(names)) == len(names)
        assert {check["name"]: check["recorded"] for check in checks} == recorded.get(notebook.stem, {"values": {}})["values"]
        assert all(check["passed"] for check in checks)
