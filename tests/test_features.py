"""Windows and their labels, question cutting, padding, batches of like lengths, and the cache of windows on disk."""

import os
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import DATA, REAL_SOURCES

from ptv2 import features as module
from ptv2.backbone import DEFAULT_BACKBONE, load_tokenizer, resolve_backbone
from ptv2.errors import InputError
from ptv2.features import LengthGroupedSampler, WindowConfig, batches_by_length, collate, make_features, training_span
from ptv2.squad import Example, Span, load_examples

SMALL = WindowConfig(max_length=48, stride=10, max_question_length=16)


@pytest.fixture
def tokenizer(tiny_backbone):
    return tokenizer_of(str(tiny_backbone))


@cache
def tokenizer_of(name: str):
    return load_tokenizer(resolve_backbone(name))


def rows_of(examples: list[Example], tokenizer, config: WindowConfig) -> list[dict]:
    return list(make_features(examples, tokenizer, config, cache=False))


def parts_of(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of the question and of the context, without special ones: <cls> question <sep> [<sep>] context <sep>."""
    ids = row["input_ids"]
    first = ids.index(tokenizer.sep_token_id)
    second = first + 1 + (ids[first + 1] == tokenizer.sep_token_id)
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    return ids[1:first], ids[second:-1]


def labelled_text(row: dict, example: Example) -> str | None:
    """The context's characters under the labelled tokens; None where the label says "no answer"."""
    first, last = row["start_positions"], row["end_positions"]
    assert (first == row["cls"]) == (last == row["cls"])
    return None if first == row["cls"] else example.context[row["context_start"][first] : row["context_end"][last]]


def squashed(text: str, tokenizer) -> str:
    """As the tokenizer normalises it, without white space."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return "".join((normalizer.normalize_str(text) if normalizer else text).split())


@pytest.mark.parametrize("backbone", [DEFAULT_BACKBONE, "tiny_roberta"])
@pytest.mark.parametrize("source", REAL_SOURCES, ids=lambda source: Path(source).name)
def test_labels_of_real_questions_are_the_answer_token_by_token(source, backbone, request):
    tokenizer = tokenizer_of(backbone if backbone == DEFAULT_BACKBONE else str(request.getfixturevalue(backbone)))
    examples = [example for example in load_examples(source) if not example.is_impossible]
    examples = examples[:: max(1, len(examples) // 1000)]  # at most about 1,000, from the whole file
    contexts = tokenizer([e.context for e in examples], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = []  # of each example: the ids of the tokens that share a character with the answer
    for e, ids, offsets in zip(examples, contexts["input_ids"], contexts["offset_mapping"], strict=True):
        span = training_span(e)
        answers.append([token for token, (start, end) in zip(ids, offsets, strict=True) if start < span.end and end > span.start])
    found = set()
    for row in rows_of(examples, tokenizer, WindowConfig()):
        example, first, last = examples[row["example"]], row["start_positions"], row["end_positions"]
        if labelled_text(row, example) is None:
            continue
        found.add(row["example"])
        answer = training_span(example)
        ids = row["input_ids"][first : last + 1]
        assert ids == answers[row["example"]]
        assert row["context_start"][first] <= answer.start < row["context_end"][first]
        assert row["context_start"][last] < answer.end <= row["context_end"][last]
        if tokenizer.unk_token_id not in ids:
            assert squashed(answer.text, tokenizer) in squashed(tokenizer.decode(ids), tokenizer)
    assert len(found) == len(examples)  # every answer stands whole in some window


@pytest.mark.parametrize("name", ["squad_v1.json", "squad_v2.json"])
def test_handwritten_answers_are_labelled_to_the_character(name, tokenizer):
    examples = load_examples(DATA / name)
    expected = {"harbour-1": "1871", "harbour-2": "the Margarethe", "harbour-3": None, "cafe-1": "李明", "cafe-2": "🧈"}
    for row, example in zip(rows_of(examples, tokenizer, WindowConfig()), examples, strict=True):
        assert labelled_text(row, example) == expected[example.id]


@pytest.mark.parametrize("start", [4, 16, 28])
def test_answer_start_decides_which_of_equal_words_is_labelled(start, tokenizer):
    example = Example("1", "T", "Which one?", "The cat saw the cat and the cat ran.", (Span("cat", start),))
    (row,) = rows_of([example], tokenizer, WindowConfig())
    assert (row["context_start"][row["start_positions"]], row["context_end"][row["end_positions"]]) == (start, start + 3)


def test_white_space_around_an_answer_is_not_labelled(tokenizer):
    example = Example("1", "T", "When?", "It was dug in 1871 by hand.", (Span(" 1871 ", 13),))
    (row,) = rows_of([example], tokenizer, WindowConfig())
    assert training_span(example) == Span("1871", 14)
    assert labelled_text(row, example) == "1871"


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([], None),
        ([Span("a", 0)], Span("a", 0)),
        ([Span("a", 0), Span("b", 2), Span("b", 2)], Span("b", 2)),
        ([Span("a", 0), Span("a", 4), Span("b", 2)], Span("a", 0)),  # the same word elsewhere is another answer
        ([Span("b", 2), Span("a", 0), Span("a", 0), Span("b", 2)], Span("b", 2)),
    ],
    ids=["none", "one", "majority", "three-way-tie", "two-way-tie"],
)
def test_the_span_most_annotators_chose_is_trained_on(answers, chosen):
    assert training_span(Example("1", "T", "?", "a b a", tuple(answers))) == chosen


def long_examples() -> list[Example]:
    """Random spans of a long text, some longer than the overlap, so that windows cut them."""
    contexts = list(dict.fromkeys(e.context for e in load_examples("embedded", "dev")))
    context = " ".join(contexts[:3])
    words = [(i, len(word)) for i, word in zip(np.cumsum([0] + [len(w) + 1 for w in context.split(" ")]), context.split(" "), strict=False)]
    rng, examples = np.random.default_rng(0), []
    for n in range(60):
        first = int(rng.integers(0, len(words) - 20))
        last = first + int(rng.integers(0, 20))
        start, end = int(words[first][0]), int(sum(words[last]))
        examples.append(Example(str(n), "T", "What stands here?", context, (Span(context[start:end], start),)))
    return examples


def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer):
    example = long_examples()[0]
    rows = rows_of([example], tokenizer, SMALL)
    assert len(rows) > 10
    whole = []
    for row in rows:
        _, ids = parts_of(row, tokenizer)
        assert ids[: SMALL.stride] == whole[-SMALL.stride :] or not whole
        whole += ids[SMALL.stride * bool(whole) :]
    assert whole == tokenizer(example.context, add_special_tokens=False, verbose=False)["input_ids"]
    assert all(row["length"] == len(row["input_ids"]) == SMALL.max_length for row in rows[:-1])


def test_a_window_is_labelled_if_and_only_if_it_holds_the_whole_answer(tokenizer):
    examples = long_examples()
    whole = tokenizer(examples[0].context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labelled = cut = 0
    position, previous = 0, None  # of the window's first token in the whole context
    for row in rows_of(examples, tokenizer, SMALL):
        _, ids = parts_of(row, tokenizer)
        position = position if row["example"] == previous else 0
        previous = row["example"]
        answer = examples[row["example"]].answers[0]
        tokens = [i for i, (start, end) in enumerate(whole["offset_mapping"]) if start < answer.end and end > answer.start]
        inside = [i for i in tokens if position <= i < position + len(ids)]
        if inside == tokens:
            labelled += 1
            assert row["input_ids"][row["start_positions"] : row["end_positions"] + 1] == [whole["input_ids"][i] for i in tokens]
        else:
            cut += bool(inside)
            assert row["start_positions"] == row["end_positions"] == row["cls"]
        position += len(ids) - SMALL.stride
    assert labelled > 30 and cut > 30


def test_tokens_outside_the_context_have_no_characters(tokenizer):
    for row in rows_of(load_examples(DATA / "squad_v2.json"), tokenizer, WindowConfig()):
        starts, ends = np.array(row["context_start"]), np.array(row["context_end"])
        assert row["input_ids"][row["cls"]] == tokenizer.cls_token_id
        assert np.array_equal(starts == -1, ends == -1) and (ends[starts >= 0] > starts[starts >= 0]).all()
        special = np.isin(row["input_ids"], [tokenizer.cls_token_id, tokenizer.sep_token_id])
        assert (starts[special] == -1).all()
        assert tokenizer.decode(np.array(row["input_ids"])[(starts == -1) & ~special]).startswith(("W", "w"))  # Who, When, ...


def test_a_long_question_is_cut_to_its_first_tokens(tokenizer):
    question = "  Which of the many people on the islands who dug the harbour were paid in herring and copper? "
    example = Example("1", "T", question, "Two hundred men.", (Span("Two", 0),))
    for length in (1, 5, 16):
        (row,) = rows_of([example], tokenizer, replace(SMALL, max_question_length=length))
        whole = tokenizer(question.strip(), add_special_tokens=False)["input_ids"]
        assert parts_of(row, tokenizer)[0] == whole[:length] != whole
        assert labelled_text(row, example) == "Two"


def test_a_question_is_never_longer_than_its_limit_even_in_bytes(tokenizer):
    """A byte-level token may be part of a character; half a character is not kept."""
    example = Example("1", "T", "🐟🧈李明 é" * 9, "Two hundred men.", ())
    for length in range(1, 17):
        (row,) = rows_of([example], tokenizer, replace(SMALL, max_question_length=length))
        assert max(0, length - 3) <= len(parts_of(row, tokenizer)[0]) <= length


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_question_length": 0}, "max_question_length is 0; it must be at least 1"),
        ({"stride": -1}, r"stride is -1; it must be at least 0 and below max_length \(384\)"),
        ({"stride": 384}, r"stride is 384; it must be at least 0 and below max_length"),
        ({"stride": 316}, "leaves 316 tokens for the text .* more than stride"),
        (
            {"max_length": 196},
            "max_length 196 leaves 128 tokens for the text beside a question of 64; .* raise max_length or lower the others",
        ),
        ({"max_length": 0}, "below max_length"),
    ],
)
def test_window_settings_out_of_range_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        WindowConfig(**values)


def test_the_smallest_allowed_window_still_moves_on(tokenizer):
    config = WindowConfig(max_length=25, stride=4, max_question_length=16)  # 5 tokens of text, 4 of them seen before
    assert len(rows_of([replace(long_examples()[0], question="who " * 30)], tokenizer, config)) > 100


def test_windows_longer_than_the_backbone_reads_are_refused(tokenizer):
    with pytest.raises(InputError, match="max_length is 513; this backbone reads at most 512 tokens"):
        make_features(load_examples(DATA / "squad_v1.json"), tokenizer, WindowConfig(max_length=513))


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_as_the_tokenizer_does_and_moves_the_labels(side, tiny_backbone):
    tokenizer = load_tokenizer(resolve_backbone(str(tiny_backbone)))
    tokenizer.padding_side = side
    rows = rows_of(load_examples(DATA / "squad_v2.json"), tokenizer, WindowConfig())
    batch = collate(rows, tokenizer)
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    assert names == [name for name in tokenizer.model_input_names if name != "attention_mask"]
    expected = tokenizer.pad({name: [row[name] for row in rows] for name in names}, padding="longest", return_tensors="pt")
    assert len({row["length"] for row in rows}) > 1
    for name in (*names, "attention_mask"):
        assert torch.equal(batch[name], expected[name])
    for i, row in enumerate(rows):
        for name in ("start_positions", "end_positions"):
            assert batch["input_ids"][i, batch[name][i]] == row["input_ids"][row[name]]
            assert batch["attention_mask"][i, : batch[name][i] + 1].sum() == row[name] + 1  # the same token, not only an equal one


@cache
def real_lengths(source: str) -> list[int]:
    return make_features(load_examples(source), tokenizer_of(DEFAULT_BACKBONE), WindowConfig())["length"][:]


def padding(lengths: list[int], batches: list[list[int]]) -> float:
    """The share of padding among all tokens of the padded batches."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded


@pytest.mark.parametrize("batch_size", [16, 32])
@pytest.mark.parametrize("source", REAL_SOURCES, ids=lambda source: Path(source).name)
def test_batches_of_real_questions_hold_under_5_percent_padding(source, batch_size):
    lengths = real_lengths(source)
    order = list(LengthGroupedSampler(lengths, batch_size, seed=0))
    assert padding(lengths, [order[i : i + batch_size] for i in range(0, len(order), batch_size)]) < 0.05
    assert padding(lengths, batches_by_length(datasets.Dataset.from_dict({"length": lengths}), batch_size)) < 0.05


@pytest.mark.parametrize("n", [1, 15, 16, 1000])
def test_the_sampler_gives_each_index_once_and_the_order_depends_on_seed_and_epoch(n):
    lengths = np.random.default_rng(0).integers(20, 384, n).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 16, seed)
        sampler.set_epoch(epoch)
        torch.rand(seed + 3)  # the global generator, which a resumed run has moved on, must not matter
        assert len(sampler) == n
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(indices) == list(range(n)) for indices in orders)
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    if n == 1000:
        assert len(set(map(tuple, orders))) == 9
        batches = [orders[0][i : i + 16] for i in range(0, n, 16)]
        longest = [max(lengths[i] for i in batch) for batch in batches]
        assert len(batches[-1]) == n % 16  # the smaller batch is the last one
        assert sum(a < b for a, b in pairwise(longest)) > 15  # whole batches come in random order, not from long to short


@pytest.mark.parametrize("batch_size", [1, 7, 50, 80])
def test_evaluation_batches_go_from_long_to_short_and_hold_every_row_once(batch_size):
    lengths = np.random.default_rng(0).integers(20, 384, 50).tolist()
    batches = batches_by_length(datasets.Dataset.from_dict({"length": lengths}), batch_size)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(50))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [min(batch_size, 50 - i) for i in range(0, 50, batch_size)]


# The cache


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """How many examples each call to the tokenizer got, as it happens."""
    calls, windows = [], module._windows
    monkeypatch.setattr(module, "_windows", lambda examples, *rest: calls.append(len(examples)) or windows(examples, *rest))
    return calls


def test_the_same_questions_are_tokenised_once(tiny_bert, tokenised):
    examples = load_examples("embedded", "dev")
    first = make_features(examples, load_tokenizer(resolve_backbone(str(tiny_bert))), WindowConfig())
    assert sum(tokenised) == len(examples)
    tokenizer = load_tokenizer(resolve_backbone(str(tiny_bert)))
    tokenizer("Another use", padding="max_length", truncation=True, max_length=9)  # leaves settings in the tokenizer
    second = make_features(list(examples), tokenizer, WindowConfig())
    assert sum(tokenised) == len(examples)  # none again
    assert second.cache_files == first.cache_files
    assert second.to_list() == first.to_list()


def test_other_questions_settings_or_columns_are_tokenised_anew(tiny_bert, tokenised):
    examples, tokenizer = load_examples(DATA / "squad_v1.json"), load_tokenizer(resolve_backbone(str(tiny_bert)))
    without_types = load_tokenizer(resolve_backbone(str(tiny_bert)))
    without_types.model_input_names = ["input_ids", "attention_mask"]  # as DistilBERT's, with BERT's vocabulary
    changed = [replace(examples[0], context=examples[0].context + "!"), *examples[1:]]
    answered = [replace(examples[0], answers=()), *examples[1:]]
    variants = [
        (examples, tokenizer, WindowConfig(stride=126)),
        (examples, tokenizer, WindowConfig(stride=127)),
        (examples, tokenizer, WindowConfig(max_length=383)),
        (examples, tokenizer, WindowConfig(max_question_length=63)),
        (changed, tokenizer, WindowConfig(stride=126)),
        (answered, tokenizer, WindowConfig(stride=126)),
        (examples, without_types, WindowConfig(stride=126)),
    ]
    columns = [make_features(*variant).column_names for variant in variants]
    assert len(tokenised) == len(variants)
    assert ["token_type_ids" in names for names in columns] == [True] * 6 + [False]


def test_without_the_cache_nothing_is_written(tiny_bert, tokenised):
    folder = Path(os.environ["HF_DATASETS_CACHE"])
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        rows_of(load_examples(DATA / "squad_v2.json"), tokenizer_of(str(tiny_bert)), replace(SMALL, stride=3))
    assert sorted(folder.rglob("*")) == before
    assert len(tokenised) == 2
