"""Reading questions: every form that is accepted, every fault and its sentence, hashes and the held-out split."""

import copy
import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from conftest import DATA, QUESTION_FILES, REAL_SOURCES

from ptv2.errors import InputError
from ptv2.squad import Example, Span, draw_examples, examples_sha256, hold_out, load_examples

CONTENT = {name: json.loads((DATA / name).read_text(encoding="utf-8")) for name in ("squad_v1.json", "squad_v2.json")}


def raw_questions(content: dict) -> list[tuple]:
    """(id, title, question, context, [(text, start)]) by plain loops: what the reader must give, one for one."""
    return [
        (q["id"], a["title"], q["question"], p["context"], [(s["text"], s["answer_start"]) for s in q["answers"]])
        for a in content["data"]
        for p in a["paragraphs"]
        for q in p["qas"]
    ]


def as_raw(examples: list[Example]) -> list[tuple]:
    return [(e.id, e.title, e.question, e.context, [(s.text, s.start) for s in e.answers]) for e in examples]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no-bom", "bom"])
@pytest.mark.parametrize("name", CONTENT)
def test_a_file_is_read_question_by_question(name, mark, compress, tmp_path):
    path = tmp_path / "questions.any"  # the content tells the form, not the ending
    path.write_bytes(compress(mark + (DATA / name).read_bytes()))
    examples = load_examples(path)
    assert as_raw(examples) == raw_questions(CONTENT[name])
    assert [e.is_impossible for e in examples] == [not answers for *_, answers in raw_questions(CONTENT[name])]
    assert load_examples(str(path), "dev") == examples


@pytest.mark.parametrize("path", QUESTION_FILES, ids=lambda path: path.name)
def test_nothing_of_a_real_file_is_dropped(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        assert as_raw(load_examples(path)) == raw_questions(json.load(stream))


@pytest.mark.parametrize("source", REAL_SOURCES, ids=lambda source: Path(source).name)
def test_every_real_span_stands_where_it_says(source):
    for example in load_examples(source):
        assert all(example.context[span.start : span.end] == span.text for span in example.answers)


def test_the_embedded_corpus_has_two_splits():
    train, dev = load_examples("embedded"), load_examples("embedded", "dev")
    assert len(train) > 3 * len(dev) > 0
    assert not {e.id for e in train} & {e.id for e in dev}


def test_a_missing_answers_field_is_allowed_only_where_the_question_is_impossible(tmp_path):
    content = copy.deepcopy(CONTENT["squad_v2.json"])
    del content["data"][0]["paragraphs"][0]["qas"][2]["answers"]
    assert len(load_examples(written(tmp_path, content))) == 5
    content["data"][0]["paragraphs"][0]["qas"][2]["is_impossible"] = False
    with pytest.raises(InputError, match=r'question harbour-3: the field "answers" is missing'):
        load_examples(written(tmp_path, content))


# Data sets in hub layout


def rows_of(examples: list[Example]) -> dict[str, list]:
    return {
        "id": [e.id for e in examples],
        "title": [e.title for e in examples],
        "context": [e.context for e in examples],
        "question": [e.question for e in examples],
        "answers": [{"text": [s.text for s in e.answers], "answer_start": [s.start for s in e.answers]} for e in examples],
    }


def hub_directory(path: Path, train: dict, validation: dict | None = None) -> str:
    (path / "plain_text").mkdir(parents=True)
    for split, columns in (("train", train), ("validation", validation or train)):
        datasets.Dataset.from_dict(columns).to_parquet(str(path / "plain_text" / f"{split}-00000-of-00001.parquet"))
    return str(path)


def test_a_data_set_in_hub_layout_gives_both_splits(tmp_path):
    first, second = (load_examples(DATA / name) for name in CONTENT)
    source = hub_directory(tmp_path / "data", rows_of(first), rows_of(second))
    assert load_examples(source, "train") == first
    assert load_examples(source, "dev") == second


def test_a_data_set_may_lack_titles_and_number_its_questions(tmp_path):
    columns = rows_of(load_examples(DATA / "squad_v1.json")) | {"id": [1, 2, 3, 4]}
    del columns["title"]
    examples = load_examples(hub_directory(tmp_path / "data", columns))
    assert [(e.id, e.title) for e in examples] == [("1", ""), ("2", ""), ("3", ""), ("4", "")]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": None}, 'row 0, question None: the field "id" is missing; add it'),
        ({"question": None}, 'question harbour-1: the field "question" is missing; add it'),
        ({"answers": None}, 'question harbour-1: the field "answers" is missing; add it'),
        ({"context": [None]}, 'question harbour-1: the field "context" is of type NoneType'),
        ({"context": [7]}, 'question harbour-1: the field "context" is of type int'),
        ({"answers": ["1871"]}, 'question harbour-1: the field "answers" is of type str'),
        ({"answers": [{"text": "1871", "answer_start": 34}]}, 'question harbour-1: the field "text" is of type str'),
        ({"answers": [{"text": ["1871"]}]}, 'question harbour-1: the field "answer_start" is missing'),
        ({"answers": [{"text": ["1871", "in"], "answer_start": [34]}]}, "2 answer texts stand beside 1 answer_start; give one for each"),
        (
            {"answers": [{"text": ["1871"], "answer_start": [35]}]},
            r"the answer '1871' is not at character 35, .*'871 '; correct answer_start",
        ),
    ],
)
def test_a_faulty_data_set_is_refused_with_its_row_and_question(change, sentence, tmp_path):
    columns = {name: values[:1] for name, values in rows_of(load_examples(DATA / "squad_v1.json")).items()} | change
    source = hub_directory(tmp_path / "data", {name: values for name, values in columns.items() if values is not None})
    with pytest.raises(InputError, match=sentence) as refused:
        load_examples(source, "dev")
    assert str(refused.value).startswith(f"{source} (validation), row 0")


@pytest.mark.parametrize("name", ["nobody/no-such-data-set", "no-such-directory"])
def test_an_unknown_data_set_is_refused_by_name(name):
    with pytest.raises(InputError, match=rf'"{name}" is no file, and as a data set it could not be loaded: \w+: \w+'):
        load_examples(name)


# Faulty files


def written(folder: Path, content: object) -> Path:
    path = folder / "faulty.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


TRUNCATED = gzip.compress((DATA / "squad_v1.json").read_bytes(), mtime=0)[:-20]
DAMAGED = TRUNCATED[:40] + bytes([TRUNCATED[40] ^ 0xFF]) + TRUNCATED[41:]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "is not valid JSON: .*Mend it there or download it again"),
        (b'{"data": [', "is not valid JSON: .*char 10.*Mend it there or download it again"),
        (b"[" * 200_000, "is not valid JSON: .*recursion.*Mend it there or download it again"),
        (b'{"data":' * 100_000, "is not valid JSON: .*recursion.*Mend it there or download it again"),
        (TRUNCATED, "could not be read: .*ended before.*Copy or download it again"),
        (DAMAGED, "could not be read: .*decompressing.*Copy or download it again"),
        ('{"data": "Café"}'.encode("latin-1"), r"is not UTF-8 text \(.* at byte 13\). Save it as UTF-8"),
        ('{"data": []}'.encode("utf-16"), "is not UTF-8 text .* Save it as UTF-8"),
        (b"[]", 'the field "data" is missing; add it'),
        (b'{"data": {}}', 'the field "data" is of type dict'),
        (b'{"data": []}', "holds no questions"),
        (b'{"data": [{"title": "T", "paragraphs": []}]}', "holds no questions"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_an_unreadable_file_is_refused_by_name(raw, sentence, tmp_path):
    path = tmp_path / "faulty.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=sentence) as refused:
        load_examples(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("name", ["absent.json", "absent.json.gz"])
def test_an_absent_file_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"^{name} does not exist"):
        load_examples(name)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match='"test" is unknown; choose "train" or "dev"'):
        load_examples("embedded", "test")


ARTICLE, PARAGRAPH = r"article 0 \(Harbour\)", r"article 0 \(Harbour\), paragraph 0"
QUESTION = rf"{PARAGRAPH}, question harbour-2"
MISSING = object()
FAULTS = [
    ((), "paragraphs", MISSING, rf'{ARTICLE}: the field "paragraphs" is missing; add it'),
    ((), "paragraphs", 3, rf'{ARTICLE}: the field "paragraphs" is of type int'),
    ((0,), "context", MISSING, rf'{PARAGRAPH}: the field "context" is missing; add it'),
    ((0,), "context", 1871, rf'{PARAGRAPH}: the field "context" is of type int'),
    ((0,), "context", " \n", rf"{PARAGRAPH}, question harbour-1: the context is empty; give it a text\. \(2 more like this\)"),
    ((0,), "qas", MISSING, rf'{PARAGRAPH}: the field "qas" is missing; add it'),
    ((0,), "qas", {}, rf'{PARAGRAPH}: the field "qas" is of type dict'),
    ((0,), "qas", ["Who?"], rf'{PARAGRAPH}, question 0: the field "answers" is missing; add it'),
    ((0, 1), "id", MISSING, rf'{PARAGRAPH}, question 1: the field "id" is missing; add it'),
    ((0, 1), "id", None, r'question None: the field "id" is of type NoneType'),
    ((0, 1), "id", "harbour-1", rf"{PARAGRAPH}, question harbour-1: this id was used before; ids must differ\.$"),
    ((0, 1), "question", MISSING, rf'{QUESTION}: the field "question" is missing; add it'),
    ((0, 1), "question", ["Which"], rf'{QUESTION}: the field "question" is of type list'),
    ((0, 1), "question", "  ", rf"{QUESTION}: the question is empty; give it a text"),
    ((0, 1), "question", "Which \ud83d?", rf"{QUESTION}: the text holds half of a surrogate pair, .*; take it out"),
    ((0, 1), "answers", MISSING, rf'{QUESTION}: the field "answers" is missing; add it'),
    ((0, 1), "answers", {"text": "1871", "answer_start": 34}, rf'{QUESTION}: the field "answers" is of type dict'),
    ((0, 1), "answers", ["1871"], rf'{QUESTION}: an answer lacks the field "text"; add it'),
    ((0, 1), "answers", [{"answer_start": 34}], rf'{QUESTION}: an answer lacks the field "text"; add it'),
    ((0, 1), "answers", [{"text": 1871, "answer_start": 34}], rf'{QUESTION}: an answer lacks the field "text"; add it'),
    ((0, 1), "answers", [{"text": " ", "answer_start": 3}], rf"{QUESTION}: an answer is empty; leave it out, and set is_impossible"),
    ((0, 1), "answers", [{"text": "1871"}], rf'{QUESTION}: an answer lacks the whole number "answer_start"; add it'),
    ((0, 1), "answers", [{"text": "1871", "answer_start": "34"}], rf'{QUESTION}: an answer lacks the whole number "answer_start"'),
    ((0, 1), "answers", [{"text": "1871", "answer_start": 34.0}], rf'{QUESTION}: an answer lacks the whole number "answer_start"'),
    ((0, 1), "answers", [{"text": "h", "answer_start": True}], rf'{QUESTION}: an answer lacks the whole number "answer_start"'),
    ((0, 1), "answers", [{"text": "Riga", "answer_start": -5}], rf"{QUESTION}: the answer 'Riga' is not at character -5,"),
    ((0, 1), "answers", [{"text": "1871", "answer_start": 33}], rf"{QUESTION}: the answer '1871' is not at character 33, .*' 187'"),
    ((0, 1), "answers", [{"text": "1871", "answer_start": 10**9}], rf"{QUESTION}: the answer '1871' is not at character 1000000000"),
    ((0, 1), "is_impossible", True, rf"{QUESTION}: is_impossible is true, yet there are answers; correct one of the two"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "key", "value", "sentence"), FAULTS, ids=[f"{key}-{i}" for i, (_, key, *_) in enumerate(FAULTS)])
def test_a_faulty_field_is_refused_with_its_place(place, key, value, sentence, tmp_path):
    content = copy.deepcopy(CONTENT["squad_v2.json"])
    holder = content["data"][0]
    for name, index in zip(("paragraphs", "qas"), place, strict=False):
        holder = holder[name][index]
    if value is MISSING:
        del holder[key]
    else:
        holder[key] = value
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=f"{path}, {sentence}" if "article" in sentence else sentence):
        load_examples(path)


# Hash and held-out split


def test_the_hash_of_examples_is_the_same_everywhere():
    examples = [Example("1", "T", "Who?", "The cat – 🐟.", (Span("cat", 4),)), Example("2", "T", "Why?", "No.", ())]
    assert examples_sha256(examples) == "f610085b380136fd8abaee06531eef16e4b75c885c09185755c86d814fdae0b1"
    assert examples_sha256(iter(examples)) == examples_sha256(examples)


def test_the_hash_changes_with_every_part_of_an_example():
    example = Example("1", "T", "Who?", "The cat sat.", (Span("cat", 4), Span("The cat", 0)))
    other = Example("2", "T", "Who?", "The cat sat.", ())
    variants = [
        [example, other],
        [other, example],
        [example],
        [],
        *([replace(example, **{name: "another cat"}), other] for name in ("id", "title", "question", "context")),
        [replace(example, answers=example.answers[::-1]), other],
        [replace(example, answers=example.answers[:1]), other],
        [replace(example, answers=(Span("cat", 5), Span("The cat", 0))), other],
        [replace(example, answers=(Span("car", 4), Span("The cat", 0))), other],
    ]
    assert len({examples_sha256(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("source", REAL_SOURCES, ids=lambda source: Path(source).name)
def test_held_out_questions_share_no_text_with_kept_ones(source, share):
    examples = load_examples(source)
    kept, out = hold_out(examples, share)
    place = {e.id: i for i, e in enumerate(examples)}
    for side in (kept, out):
        assert [place[e.id] for e in side] == sorted(place[e.id] for e in side)  # the original order
    assert sorted(place[e.id] for e in kept + out) == list(range(len(examples)))  # nothing lost, nothing twice
    assert not {e.context for e in kept} & {e.context for e in out}
    assert share <= len(out) / len(examples) < share + 0.1
    # Only an article with over a tenth of all questions may be cut, as where all of them share one title.
    sizes = Counter(e.title for e in examples)
    assert all(sizes[title] > len(examples) / 10 for title in {e.title for e in kept} & {e.title for e in out})


def test_a_file_of_one_article_is_split_by_paragraph():
    examples = [Example(f"{p}-{q}", "T", "Who?", f"Text {p}.", ()) for p in range(40) for q in range(3)]
    kept, out = hold_out(examples, 0.1)
    assert not {e.context for e in kept} & {e.context for e in out}
    assert len(out) == 12 and len(kept) == 108
    with pytest.raises(InputError, match="All 3 questions would be held out, none kept; give more texts or a smaller share"):
        hold_out(examples[:3], 0.1)


def test_the_split_depends_on_the_seed_alone():
    examples = load_examples("embedded")
    random.seed(1)
    first = hold_out(examples, 0.2, seed=3)
    random.seed(2)
    assert hold_out(examples, 0.2, seed=3) == first
    assert hold_out(examples, 0.2, seed=4) != first


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(InputError, match=r"held-out share is .*; it must be above 0 and below 1"):
        hold_out(load_examples(DATA / "squad_v1.json"), share)


def test_a_smaller_draw_is_part_of_a_larger_one_and_keeps_the_order():
    examples = load_examples("embedded")
    place = {e.id: i for i, e in enumerate(examples)}
    few, more, other = draw_examples(examples, 32, 5), draw_examples(examples, 128, 5), draw_examples(examples, 32, 6)
    assert len(few) == 32 and len(more) == 128 and set(few) < set(more) and few != other
    assert [place[e.id] for e in more] == sorted(place[e.id] for e in more)
    assert len({e.title for e in few}) > 10  # from everywhere, not the first ones
    assert draw_examples(examples, len(examples), 0) == examples


def test_a_draw_of_more_questions_than_there_are_is_refused():
    with pytest.raises(InputError, match="5 questions were asked for, but there are 4; take fewer, or 0 for all"):
        draw_examples(load_examples("embedded")[:4], 5, 0)
