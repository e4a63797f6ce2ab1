"""From examples to batches: tokenised windows with overlap, exact token labels, and batches of like lengths."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerFast
from transformers.trainer_pt_utils import get_length_grouped_indices

from ptv2.errors import InputError
from ptv2.squad import Example, Span, examples_sha256

MODEL_INPUTS = ("input_ids", "token_type_ids", "start_positions", "end_positions")
_FORM = 1  # raise when the columns change, so that an older cache is not reused


@dataclass(frozen=True)
class WindowConfig:
    """How long texts are cut into windows; the defaults are BERT's own.

    Args:
        max_length: of a window, question and special tokens included, in tokens.
        stride: by how many tokens windows of one text overlap.
        max_question_length: longer questions are cut off, in tokens.

    Source: Devlin et al., NAACL 2019, `run_squad.py` (https://github.com/google-research/bert).
    """

    max_length: int = 384
    stride: int = 128
    max_question_length: int = 64

    def __post_init__(self):
        if self.max_question_length < 1:
            raise InputError(f"max_question_length is {self.max_question_length}; it must be at least 1.")
        if not 0 <= self.stride < self.max_length:
            raise InputError(f"stride is {self.stride}; it must be at least 0 and below max_length ({self.max_length}).")
        room = self.max_length - self.max_question_length - 4  # special tokens
        if room <= self.stride:
            raise InputError(
                f"max_length {self.max_length} leaves {room} tokens for the text beside a question of "
                f"{self.max_question_length}; it must be more than stride ({self.stride}): raise max_length or lower the others."
            )


def make_features(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, config: WindowConfig, cache: bool = True
) -> datasets.Dataset:
    """Windows of all examples, one row each, cached on disk by `datasets` and reused for the same data and settings.

    Columns: input_ids, token_type_ids (if the tokenizer has them), length; example (index into `examples`);
    context_start and context_end (each token's character range in the context, -1 for other tokens); cls (index of
    the token that stands for "no answer"); start_positions and end_positions (token indices of the answer; `cls`
    where the window does not hold the whole answer).

    Raises:
        InputError: the windows are longer than the model reads.
    """
    if config.max_length > tokenizer.model_max_length:
        raise InputError(f"max_length is {config.max_length}; this backbone reads at most {tokenizer.model_max_length} tokens.")
    rows = datasets.Dataset.from_dict({"index": range(len(examples))})
    fingerprint = _fingerprint(examples, tokenizer, config)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ptv2"
    if cache:
        folder.mkdir(parents=True, exist_ok=True)
    return rows.map(
        lambda batch: _windows([examples[i] for i in batch["index"]], batch["index"], tokenizer, config),
        batched=True,
        batch_size=256,
        remove_columns=["index"],
        features=_columns(tokenizer),
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow") if cache else None,
        load_from_cache_file=cache,
        keep_in_memory=not cache,
        desc="tokenise",
    )


def _fingerprint(examples: list[Example], tokenizer: PreTrainedTokenizerFast, config: WindowConfig) -> str:
    """A hash of all that the windows depend on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call set is no part of the tokenizer; the next call sets its own
    backend.no_padding()
    described = [backend.to_str(), tokenizer.cls_token_id, tokenizer.truncation_side, list(_columns(tokenizer))]
    key = json.dumps([_FORM, asdict(config), examples_sha256(examples), described])
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _columns(tokenizer: PreTrainedTokenizerFast) -> datasets.Features:
    one, many = datasets.Value("int32"), datasets.List(datasets.Value("int32"))
    lists = ["input_ids", "context_start", "context_end"] + ["token_type_ids"] * ("token_type_ids" in tokenizer.model_input_names)
    single = ["length", "example", "cls", "start_positions", "end_positions"]
    return datasets.Features({**dict.fromkeys(lists, many), **dict.fromkeys(single, one)})


def _windows(examples: list[Example], indices: list[int], tokenizer: PreTrainedTokenizerFast, config: WindowConfig) -> dict[str, list]:
    questions = [_shorten(example.question.strip(), tokenizer, config.max_question_length) for example in examples]
    encoded = tokenizer(
        questions,
        [example.context for example in examples],
        truncation="only_second",
        max_length=config.max_length,
        stride=config.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns: dict[str, list] = {name: [] for name in _columns(tokenizer)}
    for window, which in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = encoded["input_ids"][window]
        start = np.array([offset[0] for offset in encoded["offset_mapping"][window]])
        end = np.array([offset[1] for offset in encoded["offset_mapping"][window]])
        outside = np.array([part != 1 for part in encoded.sequence_ids(window)]) | (start == end)
        start[outside], end[outside] = -1, -1
        cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        first, last = _label(training_span(examples[which]), start, end, cls)
        columns["input_ids"].append(ids)
        if "token_type_ids" in columns:
            columns["token_type_ids"].append(encoded["token_type_ids"][window])
        columns["length"].append(len(ids))
        columns["example"].append(indices[which])
        columns["context_start"].append(start)
        columns["context_end"].append(end)
        columns["cls"].append(cls)
        columns["start_positions"].append(first)
        columns["end_positions"].append(last)
    return columns


def _shorten(question: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> str:
    """The question's first `max_tokens` tokens, as text; fewer where the last of them is only part of a character."""
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= max_tokens:
        return question
    return question[: min(offsets[max_tokens - 1][1], offsets[max_tokens][0])]  # the bytes of one character share its range


def training_span(example: Example) -> Span | None:
    """The answer to train on: the span most annotators chose, the first of them on a tie; without outer white space."""
    if example.is_impossible:
        return None
    votes = Counter(example.answers)
    best = max(example.answers, key=votes.__getitem__)  # max keeps the first of equals
    stripped = best.text.strip()
    return Span(stripped, best.start + best.text.index(stripped))


def _label(span: Span | None, start: np.ndarray, end: np.ndarray, cls: int) -> tuple[int, int]:
    """Token indices of the first and last token that touch the span; (cls, cls) unless all of it is in the window."""
    if span is None:
        return cls, cls
    inside = start >= 0
    touching = np.flatnonzero(inside & (start < span.end) & (end > span.start))
    tokens = np.flatnonzero(inside)
    if not len(touching) or start[tokens[0]] > span.start or end[tokens[-1]] < span.end:
        return cls, cls
    return int(touching[0]), int(touching[-1])


def collate(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Rows to one batch, padded to its longest: int64 [B, S] each, labels [B]; the mask tells padding."""
    S = max(len(row["input_ids"]) for row in rows)
    left = tokenizer.padding_side == "left"
    batch = {"attention_mask": torch.zeros(len(rows), S, dtype=torch.long)}
    for name in MODEL_INPUTS:
        if name not in rows[0]:
            continue
        if name.endswith("_positions"):
            moved = [row[name] + (S - len(row["input_ids"])) * left for row in rows]
            batch[name] = torch.tensor(moved)
            continue
        fill = tokenizer.pad_token_id if name == "input_ids" else tokenizer.pad_token_type_id
        batch[name] = torch.full((len(rows), S), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(S - len(row[name]), S) if left else slice(0, len(row[name]))
            batch[name][i, place] = torch.as_tensor(row[name])
            batch["attention_mask"][i, place] = 1
    return batch


class LengthGroupedSampler(Sampler[int]):
    """A random order in which neighbours have like lengths (transformers' own grouping), the same for a seed and epoch.

    transformers' sampler draws from the global generator, which a resumed run has moved on, and runs from long to
    short texts again and again; here whole batches are shuffled.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # As many batches are sorted at a time as transformers takes, but at least 25: fewer would pad small data sets much.
        at_a_time = max(25, min(len(self.lengths) // (self.batch_size * 4), 50))
        order = get_length_grouped_indices(self.lengths, self.batch_size, at_a_time, generator)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        full = len(order) // self.batch_size  # a last, smaller batch stays last, so that no other is cut in two
        shuffled = [batches[i] for i in torch.randperm(full, generator=generator).tolist()] + batches[full:]
        return (index for batch in shuffled for index in batch)


def batches_by_length(features: datasets.Dataset, batch_size: int) -> list[list[int]]:
    """Row indices in batches of like lengths, longest first, for evaluation."""
    order = np.argsort(-np.asarray(features["length"]), kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
