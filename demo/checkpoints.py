"""Which trained methods there are: those that ship with the repository, and the runs of a folder, looked up at each use."""

import json
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "results" / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with trained weights.

    Args:
        name: unique, as people and the API call it.
        path: the directory.
        method: as ptv2.json says, "unknown" where that cannot be read.
        changed: of its newest file, in nanoseconds since 1970.
        stored_bytes: size of its weights.
    """

    name: str
    path: Path
    method: str
    changed: int
    stored_bytes: int


def find_checkpoints(runs: Path | None) -> list[Checkpoint]:
    """Those that ship, then the runs in the directory `runs`, newest first."""
    shipped = [_read(path, path.name) for path in _directories(SHIPPED)]
    trained = [_read(path, f"runs/{path.name}") for path in _directories(runs)]
    order = ["p-tuning-v2", "fine-tuning", "head-only"]
    first = sorted(filter(None, shipped), key=lambda found: order.index(found.method) if found.method in order else len(order))
    return first + sorted(filter(None, trained), key=lambda found: -found.changed)


def _directories(parent: Path | None) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir()) if parent else []
    except OSError:  # the folder is not there, or not yet
        return []


def _read(path: Path, name: str) -> Checkpoint | None:
    """None where there are no finished weights, or where the directory goes away meanwhile."""
    try:
        weights = [file.stat() for file in path.glob("*.safetensors")]
        description = path / "ptv2.json"
        if not weights or not description.is_file():
            return None
        changed = max(file.st_mtime_ns for file in [*weights, description.stat()])
    except OSError:
        return None
    return Checkpoint(name, path, _method(description), changed, sum(file.st_size for file in weights))


def _method(description: Path) -> str:
    try:
        return str(json.loads(description.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
