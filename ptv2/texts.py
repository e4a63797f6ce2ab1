"""Plain texts to make questions from, and where they are read."""

from dataclasses import dataclass
from pathlib import Path

from ptv2.errors import InputError
from ptv2.phrases import sentences
from ptv2.squad import draw_examples, load_examples, load_rows

PASSAGE_CHARACTERS = 1500  # of a long text, so many go together; a paragraph of SQuAD has about half


@dataclass(frozen=True)
class Text:
    """A text and the article, file or data set that it comes from."""

    title: str
    context: str


def passages(text: str) -> list[str]:
    """A long text in pieces of whole sentences, each of at most `PASSAGE_CHARACTERS` unless one sentence is longer."""
    pieces, start, end = [], 0, 0
    for sentence in sentences(text):
        if end > start and sentence.end - start > PASSAGE_CHARACTERS:
            pieces.append(text[start:end].strip())
            start = sentence.start
        end = sentence.end
    return [piece for piece in (*pieces, text[start:end].strip()) if piece]


def load_texts(sources: tuple[str, ...], split: str = "train", max_texts: int = 0) -> list[Text]:
    """The texts of all sources, in their order, each once.

    Args:
        sources: text files; directories with .txt files; SQuAD files, "embedded" or data sets in SQuAD's columns, whose
            contexts are read without their questions; or data sets with a column `text`.
        split: "train" or "dev", of those that have splits.
        max_texts: draw so many of them, always the same; 0 for all.

    Raises:
        InputError: a source can't be read, or holds no text.
    """
    texts = {}
    for source in sources:
        found = _load(str(source), split)
        if not found:
            raise InputError(f"{source} holds no text.")
        for text in found:
            texts.setdefault(text.context, text)
    all_texts = list(texts.values())
    return draw_examples(all_texts, max_texts, seed=0) if 0 < max_texts < len(all_texts) else all_texts


def _load(source: str, split: str) -> list[Text]:
    path = Path(source).expanduser()
    if source == "embedded" or source.endswith((".json", ".gz")):
        return [Text(example.title, example.context) for example in load_examples(source, split)]
    files = [path] if path.is_file() else sorted(path.rglob("*.txt")) if path.is_dir() else []
    if files:
        return [Text(file.name, passage) for file in files for passage in passages(_read(file))]
    rows = load_rows(source, split)
    if "text" in rows.column_names:
        return [Text(source, passage) for text in rows["text"] for passage in passages(text or "")]
    if "context" in rows.column_names:
        titles = rows["title"] if "title" in rows.column_names else [source] * len(rows)
        return [Text(str(title), context) for title, context in zip(titles, rows["context"], strict=True) if context.strip()]
    raise InputError(f"{source} has the columns {', '.join(rows.column_names)}, but neither text nor context; give a data set with one.")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
