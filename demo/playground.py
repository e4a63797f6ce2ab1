"""What the page and the API do, apart from how it looks: choose checkpoints, check what people give, ask, score."""

import base64
import io
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from demo import page
from demo.checkpoints import Checkpoint, find_checkpoints
from ptv2.errors import InputError
from ptv2.squad import load_examples

MAX_TEXT, MAX_QUESTION = 20_000, 1_000  # characters; others wait while a text is read
MAX_METHODS = 6  # side by side
MAX_QUESTIONS = 1_000  # scored of one file
MAX_FILE_BYTES = 5 * 2**20


def models():
    """The loaded models; the first call imports torch."""
    return import_module("demo.models").MODELS


class Playground:
    """The page's functions, for one folder of runs.

    Args:
        runs: a directory of runs to offer beside the checkpoints that ship, or None.
    """

    def __init__(self, runs: Path | None = None):
        self.runs = runs
        self.examples = load_examples("embedded", "dev")

    def checkpoints(self) -> list[Checkpoint]:
        return find_checkpoints(self.runs)

    def choose(self, names: list[str] | None) -> list[Checkpoint]:
        """The named checkpoints, in their order; all that ship if None.

        Raises:
            InputError: there are too many, or one is not there.
        """
        known = {checkpoint.name: checkpoint for checkpoint in self.checkpoints()}
        if names is None:
            names = [name for name in known if "/" not in name]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"The methods must be a list of names, such as {', '.join(known)}.")
        if not names:
            raise InputError("No method is chosen: tick at least one.")
        if len(names) > MAX_METHODS:
            raise InputError(f"{len(names)} methods are chosen; at most {MAX_METHODS} fit side by side.")
        missing = [name[:100] for name in names if name not in known]
        if missing:
            raise InputError(f"{missing[0]} is not there (any more): choose among {', '.join(known)}.")
        return [known[name] for name in dict.fromkeys(names)]

    def compare(self, question: str, text: str, names: list[str] | None) -> list:
        """Replies of the named checkpoints; see `demo.models.Models.compare`."""
        _check("question", question, MAX_QUESTION)
        _check("text", text, MAX_TEXT)
        return models().compare(question, text, self.choose(names))

    def accepted(self, question: str, text: str) -> list[str] | None:
        """What is right, if this is an example of the corpus."""
        found = [example for example in self.examples if (example.question, example.context) == (question, text)]
        return [span.text for span in found[0].answers] if found else None

    def ask(self, question: str, text: str, names: list[str]) -> str:
        replies = self.compare(question, text, names)
        return page.results(replies, text, self.accepted(question, text))

    def look_inside(self, question: str, text: str, name: str | None) -> str:
        _check("question", question, MAX_QUESTION)
        _check("text", text, MAX_TEXT)
        if not name:
            raise InputError("There is no P-tuning v2 method to look into: train one, or put one back into results/checkpoints.")
        found = models().look_inside(question, text, self.choose([name])[0])
        return page.inside(found, question, text, _png(import_module("ptv2.plots").draw_prefix_attention(found.attention.numpy())))

    def replies(self, question: str, text: str, names: list[str] | None) -> dict[str, dict]:
        """What the methods answer, as the API gives it, by name.

        Raises:
            InputError: what was given is no use, or one of the methods cannot be asked.
        """
        replies = self.compare(question, text, names)
        failed = [reply.error for reply in replies if reply.error]
        if failed:
            raise InputError(failed[0])
        return {reply.checkpoint.name: _reply_dict(reply) for reply in replies}

    def score(self, file: str | None, names: list[str] | None, limit: float) -> Iterator:
        """Yields (questions done, of how many) again and again, and at last a `demo.scoring.Report`.

        Raises:
            InputError: the file is no use; the sentence says why.
        """
        scoring = import_module("demo.scoring")
        if not isinstance(limit, int | float) or not 1 <= limit <= MAX_QUESTIONS:
            raise InputError(f"The number of questions to score must be 1 to {MAX_QUESTIONS:,}.")
        if not file:
            raise InputError("There is no file yet: choose a SQuAD file (JSON).")
        path = Path(file)
        if path.stat().st_size > MAX_FILE_BYTES:  # the upload is refused, too, but the API can name what was uploaded elsewhere
            raise InputError(f"The file has {path.stat().st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}: take a part of it.")
        if path.read_bytes()[:2] == b"\x1f\x8b":
            raise InputError("The file is compressed: unpack it first.")
        checkpoints = self.choose(names)
        examples = scoring.read_questions(path, "The file")
        for example in examples:
            _check(f"text of question {example.id}", example.context, MAX_TEXT)
            _check(f"question {example.id}", example.question, MAX_QUESTION)
        for step in scoring.score_questions(models(), examples[: int(limit)], len(examples), checkpoints):
            yield (step, min(int(limit), len(examples))) if isinstance(step, int) else step


def _reply_dict(reply) -> dict:
    best = reply.prediction.best
    return {
        "answer": best.text, "start": best.start, "end": best.end, "score": best.score, "no_answer": not best.text,
        "n_best": [asdict(answer) for answer in reply.prediction.answers], "seconds": reply.seconds, "trained": reply.trained,
        "stored_bytes": reply.checkpoint.stored_bytes,
    }  # fmt: skip


def _png(figure) -> str:
    """A figure of matplotlib as a PNG in base64; it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    import_module("matplotlib.pyplot").close(figure)
    return base64.b64encode(file.getvalue()).decode()


def _check(field: str, text: object, limit: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"The {field} is empty: write or paste one.")
    if len(text) > limit:
        raise InputError(f"The {field} has {len(text):,} characters; the limit here is {limit:,}: take a part of it.")
