"""Records: JSON that is never half there, and what it says of versions, commit, machine and memory."""

import json
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch

from ptv2 import records
from ptv2.backbone import default_device
from ptv2.errors import InputError


@pytest.mark.parametrize("content", [{"a": 1}, {"é\ud800": "李明 🐟", "list": [1.5, None]}])
def test_what_is_written_reads_back(content, tmp_path):
    file = tmp_path / "new" / "folder" / "record.json"
    records.write_json(file, content)
    assert records.read_json(file) == content
    assert file.read_text(encoding="utf-8").endswith("}\n")
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("bad", [{"a": object()}, {"deep": [[{1, 2}]]}])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(bad, tmp_path):
    file = tmp_path / "record.json"
    records.write_json(file, {"old": True})
    with pytest.raises(TypeError):
        records.write_json(file, bad)
    assert list(tmp_path.iterdir()) == [file]
    assert records.read_json(file) == {"old": True}


def test_a_write_that_the_disk_refuses_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    records.write_json(file, {"old": True})

    def full(self, data, *args, **kwargs):
        with self.open("wb") as stream:
            stream.write(data[:5] if isinstance(data, bytes) else data[:5].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(Path, "write_text", full)
        records.write_json(file, {"new": True})
    assert list(tmp_path.iterdir()) == [file]
    assert records.read_json(file) == {"old": True}


@pytest.mark.parametrize(
    "content, said",
    [
        (None, r"record\.json could not be read as JSON"),
        (b"", r"record\.json could not be read as JSON"),
        (b'{"a": ', r"record\.json could not be read as JSON"),
        (b"\xff\xfe{}", r"record\.json could not be read as JSON"),
        (b"[1, 2]", r"record\.json must hold a JSON object"),
    ],
)
def test_a_record_that_is_missing_or_broken_has_its_sentence(content, said, tmp_path):
    if content is not None:
        (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        records.read_json(tmp_path / "record.json")


def test_versions_are_those_of_the_installed_packages():
    found = records.versions()
    assert found["python"] == platform.python_version()
    for package in ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy"):
        assert found[package] == version(package)


def _repository(folder: Path, monkeypatch, tracked: bool = True) -> str:
    """A fresh repository around a stand-in for the package's file; its commit."""
    git = ("git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e")
    (folder / "package").mkdir()
    (folder / "package" / "records.py").write_text("one")
    (folder / "other.txt").write_text("one")
    for words in (("init", "-q"), ("add", "." if tracked else "other.txt"), ("commit", "-qm", "first")):
        subprocess.run((*git, *words), check=True)
    monkeypatch.setattr(records, "__file__", str(folder / "package" / "records.py"))
    return subprocess.run((*git, "rev-parse", "HEAD"), check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_packages_own_and_marked_where_its_files_changed(tmp_path, monkeypatch):
    commit = _repository(tmp_path, monkeypatch)
    assert re.fullmatch("[0-9a-f]{40}", commit) and records.git_commit() == commit
    (tmp_path / "other.txt").write_text("two")  # not the package's
    assert records.git_commit() == commit
    (tmp_path / "package" / "records.py").write_text("two")
    assert records.git_commit() == commit + "+changes"


def test_a_package_installed_inside_someone_elses_repository_has_no_commit(tmp_path, monkeypatch):
    _repository(tmp_path, monkeypatch, tracked=False)
    assert records.git_commit() is None


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.git_commit() is None


def test_the_machine_is_described_in_plain_json():
    found = records.machine()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["memory_gib"] > 0.1 and found["cpu"]


def test_peak_memory_grows_by_what_is_allocated_and_stays():
    device = default_device()
    torch.ones(1, device=device)  # a GPU, once used, is what is measured
    before = records.peak_memory_mib()
    held = (torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss) / 2**20
    block = torch.ones(int(before - held) + 64, 2**20, dtype=torch.uint8, device=device)  # 64 MiB above any earlier peak
    after = records.peak_memory_mib()
    assert after - before >= 48
    del block
    assert records.peak_memory_mib() >= after


def test_the_time_is_in_utc_to_the_second():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", records.now())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_the_peak_memory_counts_from_its_reset():
    before = records.peak_memory_mib()
    large = torch.ones(64 * 2**20)  # 256 MiB
    assert records.peak_memory_mib() > before - 1 and large.sum() > 0
    peak = records.peak_memory_mib()
    del large
    records.reset_peak_memory()
    if default_device().type == "cpu":
        assert records.peak_memory_mib() < peak - 200
