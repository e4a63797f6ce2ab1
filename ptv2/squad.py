"""Questions about texts: from a SQuAD 1.1 or 2.0 file, a hub data set or the embedded corpus, every answer span checked.

Format: https://rajpurkar.github.io/SQuAD-explorer/ (`data[].paragraphs[].{context, qas[]}`); 2.0 adds `is_impossible`
and `plausible_answers` (Rajpurkar et al., ACL 2018, https://aclanthology.org/P18-2124).
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptv2.errors import InputError

CORPUS = Path(__file__).parent / "corpus"
_HUB_SPLITS = {"train": "train", "dev": "validation"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, as JSON's escapes can spell it; no tokenizer takes it


@dataclass(frozen=True)
class Span:
    """An annotated answer: its text, and the character offset in the context at which it stands."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Example:
    """A question about a context. No answers: the context does not hold one (SQuAD 2.0)."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Span, ...]

    @property
    def is_impossible(self) -> bool:
        return not self.answers


def load_examples(source: str | Path, split: str = "train") -> list[Example]:
    """All examples of a source, in its order.

    Args:
        source: a .json or .json.gz file; "embedded"; or a data set in SQuAD's columns (`id`, `title`, `context`,
            `question`, `answers`): a hub name such as "rajpurkar/squad_v2", or a local directory laid out like one.
        split: "train" or "dev" (the hub's "validation"); a file has no splits and is read whole.

    Raises:
        InputError: names the file, the paragraph and the question of the first thing that is wrong, and how many more are.
    """
    if split not in _HUB_SPLITS:
        raise InputError(f'The split "{split}" is unknown; choose "train" or "dev".')
    if source == "embedded":
        return _read_file(CORPUS / f"{split}.json")
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if str(source).endswith((".json", ".gz")):
        raise InputError(f"{source} does not exist.")
    return _read_dataset(str(source), split)


def _read_file(path: Path) -> list[Example]:
    return checked_examples(str(path), _walk(str(path), read_json(path)))


def read_json(path: Path) -> object:
    """The content of a .json or .json.gz file.

    Raises:
        InputError: it could not be read, or is no JSON in UTF-8.
    """
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return json.loads(text.decode("utf-8-sig"))
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} could not be read: {error}. Copy or download it again.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}. Mend it there or download it again.") from error


def _read_dataset(name: str, split: str) -> list[Example]:
    source = f"{name} ({_HUB_SPLITS[split]})"
    return checked_examples(source, _rows(source, load_rows(name, split)))


def load_rows(name: str, split: str):
    """The rows of a data set, a `datasets.Dataset`: a hub name, NAME:CONFIG where there are several, or a local directory.

    Raises:
        InputError: it could not be loaded.
    """
    import datasets  # slow to import, and files do without

    try:
        name_only, _, config = name.partition(":")
        return datasets.load_dataset(name_only, config or None, split=_HUB_SPLITS[split])
    except Exception as error:  # datasets, the hub, pyarrow and fsspec each raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f'"{name}" is no file, and as a data set it could not be loaded: {type(error).__name__}: {reason}') from error


def _rows(source: str, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    """Each question of a data set with its place in it."""
    for i, row in enumerate(rows):
        at = f"{source}, row {i}, question {row.get('id')}"
        answers = _field(row, "answers", (dict, list), at)
        if isinstance(answers, dict):  # hub form: lists side by side
            texts, starts = _field(answers, "text", list, at), _field(answers, "answer_start", list, at)
            if len(texts) != len(starts):
                raise InputError(f"{at}: {len(texts)} answer texts stand beside {len(starts)} answer_start; give one for each.")
            answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
        yield at, _question(row, row.get("title"), _field(row, "context", str, at), answers, at)


def _walk(path: str, content: object) -> Iterator[tuple[str, dict]]:
    """Each question of a SQuAD file with its place in it; a wrong type or missing field stops with its place."""
    for a, article in enumerate(_field(content, "data", list, path)):
        title = article.get("title") if isinstance(article, dict) else None
        named = f"{path}, article {a} ({title})" if title else f"{path}, article {a}"
        for p, paragraph in enumerate(_field(article, "paragraphs", list, named)):
            place = f"{named}, paragraph {p}"
            context = _field(paragraph, "context", str, place)
            for q, entry in enumerate(_field(paragraph, "qas", list, place)):
                at = f"{place}, question {entry.get('id', q) if isinstance(entry, dict) else q}"
                impossible = isinstance(entry, dict) and entry.get("is_impossible") is True
                answers = [] if impossible and "answers" not in entry else _field(entry, "answers", list, at)
                yield at, _question(entry, title, context, answers, at) | {"is_impossible": impossible}


def _question(entry: dict, title: object, context: str, answers: list, at: str) -> dict:
    title = "" if title is None else str(title)
    name, question = str(_field(entry, "id", (str, int), at)), _field(entry, "question", str, at)
    return {"title": title, "context": context, "id": name, "question": question, "answers": answers, "is_impossible": False}


def _field(holder: object, name: str, kind: type | tuple, place: str):
    if not isinstance(holder, dict) or name not in holder:
        raise InputError(f'{place}: the field "{name}" is missing; add it (SQuAD form).')
    if not isinstance(holder[name], kind):
        raise InputError(f'{place}: the field "{name}" is of type {type(holder[name]).__name__}, which SQuAD\'s form does not allow there.')
    return holder[name]


def checked_examples(source: str, rows: Iterable[tuple[str, dict]]) -> list[Example]:
    """Examples from raw questions, each with its place; all are looked at before the first problem is reported.

    Raises:
        InputError: a question is wrong, or there are none.
    """
    examples, problems, seen = [], [], set()
    for place, row in rows:
        problem = _problem(row, seen)
        if problem:
            problems.append(f"{place}: {problem}")
            continue
        seen.add(row["id"])
        spans = tuple(Span(answer["text"], answer["answer_start"]) for answer in row["answers"])
        examples.append(Example(row["id"], row["title"], row["question"], row["context"], spans))
    if problems:
        more = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    if not examples:
        raise InputError(f"{source} holds no questions.")
    return examples


def _problem(row: dict, seen: set[str]) -> str | None:
    """What is wrong with a question, or None."""
    if row["id"] in seen:
        return "this id was used before; ids must differ."
    if not row["context"].strip():
        return "the context is empty; give it a text."
    if not row["question"].strip():
        return "the question is empty; give it a text."
    if row["is_impossible"] and row["answers"]:
        return "is_impossible is true, yet there are answers; correct one of the two."
    if _SURROGATE.search(row["context"] + row["question"]):
        return "the text holds half of a surrogate pair, which is no character; take it out."
    for answer in row["answers"]:
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            return 'an answer lacks the field "text"; add it.'
        start = answer.get("answer_start")
        if not isinstance(start, int) or isinstance(start, bool):
            return 'an answer lacks the whole number "answer_start"; add it.'
        text = answer["text"]
        if not text.strip():
            return "an answer is empty; leave it out, and set is_impossible if there is none."
        there = row["context"][start : start + len(text)] if start >= 0 else ""
        if there != text:
            return f"the answer {text[:60]!r} is not at character {start}, where the context has {there[:60]!r}; correct answer_start."
    return None


def examples_sha256(examples: Iterable[Example]) -> str:
    """A hash of everything in the examples, in order: what a record says a run was trained or scored on."""
    digest = hashlib.sha256()
    for example in examples:
        spans = [[span.text, span.start] for span in example.answers]
        row = [example.id, example.title, example.question, example.context, spans]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def hold_out(examples: list[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Split by article, so that no text is on both sides; an article with over a tenth of all questions is cut by paragraph.

    Args:
        examples: or texts without questions; a title and a context is all that is looked at.
        share: of the questions to hold out, above 0 and below 1.

    Returns:
        (kept, held out), each in the original order; about `share` of the questions are held out.

    Raises:
        InputError: the share is out of its range, or nothing would be kept.
    """
    if not 0.0 < share < 1.0:
        raise InputError(f"The held-out share is {share}; it must be above 0 and below 1.")
    per_title: dict[str, int] = {}
    for example in examples:
        per_title[example.title] = per_title.get(example.title, 0) + 1

    def group(example: Example) -> tuple[str, str]:
        large = per_title[example.title] > len(examples) / 10
        return (example.title, example.context if large else "")

    sizes: dict[tuple[str, str], int] = {}
    for example in examples:
        sizes[group(example)] = sizes.get(group(example), 0) + 1
    names = list(sizes)
    out, count = set(), 0
    for index in np.random.default_rng(seed).permutation(len(names)):
        if count >= share * len(examples):
            break
        out.add(names[index])
        count += sizes[names[index]]
    if len(out) == len(names):
        raise InputError(f"All {len(examples)} questions would be held out, none kept; give more texts or a smaller share.")
    return [e for e in examples if group(e) not in out], [e for e in examples if group(e) in out]


def draw_examples(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` questions at random, in their original order; a smaller draw with the same seed is part of a larger one.

    Raises:
        InputError: there are fewer questions.
    """
    if count > len(examples):
        raise InputError(f"{count} questions were asked for, but there are {len(examples)}; take fewer, or 0 for all.")
    return [examples[i] for i in sorted(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())]
