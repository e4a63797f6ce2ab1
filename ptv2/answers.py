"""From span logits to answers: n-best spans over all windows, "no answer" where that scores higher, exact text."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ptv2.backbone import default_device, load_tokenizer
from ptv2.bank import PrefixBank
from ptv2.checkpoint import DESCRIPTION_FILE, read_description
from ptv2.errors import InputError
from ptv2.features import WindowConfig, batches_by_length, collate, make_features
from ptv2.methods import load_model
from ptv2.model import SpanModel
from ptv2.squad import Example

MAX_CONTEXT_CHARACTERS = 1_000_000
MAX_QUESTION_CHARACTERS = 10_000


@dataclass(frozen=True)
class AnswerConfig:
    """How spans are chosen.

    Args:
        max_answer_length: in tokens; 30 as in BERT's run_squad.py.
        n_best: how many answers are kept per question.
        allow_no_answer: the model was trained with unanswerable questions and may decline to answer.
        no_answer_threshold: decline where the logits of "no answer" exceed the best span's by more than this.
    """

    max_answer_length: int = 30
    n_best: int = 20
    allow_no_answer: bool = False
    no_answer_threshold: float = 0.0

    def __post_init__(self):
        if self.max_answer_length < 1:
            raise InputError(f"max_answer_length is {self.max_answer_length}; it must be at least 1.")
        if self.n_best < 1:
            raise InputError(f"n_best is {self.n_best}; it must be at least 1.")
        if not math.isfinite(self.no_answer_threshold):
            raise InputError(f"no_answer_threshold is {self.no_answer_threshold}; it must be a finite number.")


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Args:
        text: `context[start:end]` to the character; "" for "no answer".
        start, end: character offsets into the context; both 0 for "no answer".
        score: probability among this question's kept answers (and "no answer", less its threshold, where that is allowed).
        logit: start plus end logit, comparable between windows and questions of one model.
    """

    text: str
    start: int
    end: int
    score: float
    logit: float


@dataclass(frozen=True)
class Prediction:
    """All that a model says of one question: answers best first, and the odds of there being none."""

    answers: tuple[Answer, ...]
    no_answer_odds: float  # logit of "no answer" minus that of the best span

    @property
    def best(self) -> Answer:
        return self.answers[0]

    @property
    def best_span(self) -> Answer:
        """The best answer that is a span of the text, whatever the odds of "no answer"."""
        return next((answer for answer in self.answers if answer.text), self.answers[0])


def best_spans(start_logits: Tensor, end_logits: Tensor, is_context: Tensor, config: AnswerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The n best spans of each window, exactly: every allowed pair of tokens is looked at.

    Args:
        start_logits, end_logits: float [B, S].
        is_context: bool [B, S], tokens where an answer may start or end.

    Returns:
        logits float [B, n], first and last token int [B, n]; logits of pairs that do not exist are -inf.
    """
    S = start_logits.shape[1]
    width = min(config.max_answer_length, S)
    floor = float("-inf")
    start = start_logits.masked_fill(~is_context, floor)  # [B, S]
    end = end_logits.masked_fill(~is_context, floor)
    # ends[b, s, w] is the end logit w tokens after s: a band of the S x S table of pairs.
    ends = torch.nn.functional.pad(end, (0, width - 1), value=floor).unfold(1, width, 1)  # [B, S, width]
    table = (start[:, :, None] + ends).flatten(1)  # [B, S * width]
    logits, place = table.topk(min(config.n_best, table.shape[1]), dim=1)  # [B, n]
    first = place // width
    return logits, first, first + place % width


@torch.inference_mode()
def predict(
    model: SpanModel | PrefixBank,
    examples: list[Example],
    features: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    configs: Sequence[AnswerConfig],
    batch_size: int = 32,
    progress: Callable = iter,
    prefixes: Sequence[int] | None = None,
) -> list[Prediction]:
    """A prediction for every example, in order.

    Args:
        features: `make_features` of the same examples.
        configs: one, or with `prefixes` one for each prefix; they agree in max_answer_length and n_best.
        progress: wraps the list of batches, such as tqdm.
        prefixes: of a bank, which prefix each example is read with.
    """
    was_training = model.training
    model.eval()
    device = model.backbone.device
    config_of = [configs[0 if prefixes is None else prefixes[i]] for i in range(len(examples))]
    spans: list[list[tuple[float, int, int]]] = [[] for _ in examples]  # logit, start, end in characters
    nulls = [math.inf] * len(examples)
    for batch_rows in progress(batches_by_length(features, batch_size)):
        rows = [features[i] for i in batch_rows]
        batch = collate(rows, tokenizer)
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if not name.endswith("_positions")}
        if prefixes is not None:
            inputs["prefix_index"] = torch.tensor([prefixes[row["example"]] for row in rows], device=device)
        output = model(**inputs)
        start_logits, end_logits = output.start_logits.cpu(), output.end_logits.cpu()  # [B, S]
        S = start_logits.shape[1]
        for which, logit, start, end, null in _spans_of_batch(rows, start_logits, end_logits, S, tokenizer, configs[0]):
            spans[which].extend(zip(logit, start, end, strict=True))
            # The window least sure that there is no answer decides, as in BERT's run_squad.py.
            nulls[which] = min(nulls[which], null)
    model.train(was_training)
    return [_choose(e.context, s, null, config) for e, s, null, config in zip(examples, spans, nulls, config_of, strict=True)]


def _spans_of_batch(
    rows: list[dict], start_logits: Tensor, end_logits: Tensor, S: int, tokenizer: PreTrainedTokenizerFast, config: AnswerConfig
) -> Iterator[tuple[int, list[float], list[int], list[int], float]]:
    """Of each window: its example, the logits and character ranges of its best spans, and its "no answer" logit."""
    left = tokenizer.padding_side == "left"
    starts, ends = torch.full((len(rows), S), -1), torch.full((len(rows), S), -1)
    shift = [(S - row["length"]) * left for row in rows]
    for i, row in enumerate(rows):
        place = slice(shift[i], shift[i] + row["length"])
        starts[i, place], ends[i, place] = torch.tensor(row["context_start"]), torch.tensor(row["context_end"])
    logits, first, last = best_spans(start_logits, end_logits, starts >= 0, config)
    for i, row in enumerate(rows):
        real = torch.isfinite(logits[i])
        cls = row["cls"] + shift[i]
        yield (
            row["example"],
            logits[i][real].tolist(),
            starts[i][first[i][real]].tolist(),
            ends[i][last[i][real]].tolist(),
            float(start_logits[i, cls] + end_logits[i, cls]),
        )


def _choose(context: str, spans: list[tuple[float, int, int]], null: float, config: AnswerConfig) -> Prediction:
    best: dict[tuple[int, int], float] = {}
    for logit, start, end in sorted(spans, reverse=True):  # windows overlap: keep a span's best logit
        best.setdefault((start, end), logit)
    kept = list(best.items())[: config.n_best]
    top = kept[0][1] if kept else float(np.finfo(np.float32).min)  # finite, as JSON wants it
    choices = [(context[start:end], start, end, logit) for (start, end), logit in kept]
    strengths = [logit for _, logit in kept]
    if config.allow_no_answer or not choices:  # a text without a single token has no span to give
        at = sum(null - strength <= config.no_answer_threshold for strength in strengths)
        choices.insert(at, ("", 0, 0, null))
        strengths.insert(at, null - config.no_answer_threshold)
    weights = np.exp(np.array(strengths) - strengths[0])
    scores = weights / weights.sum()
    answers = [Answer(*choice[:3], float(p), float(choice[3])) for choice, p in zip(choices, scores, strict=True)]
    return Prediction(tuple(answers), float(null - top))


class QuestionAnswerer:
    """A trained model for people: asks in text, answers in text.

    >>> qa = QuestionAnswerer.from_pretrained("results/checkpoints/p-tuning-v2")
    >>> qa(question="Who keeps the light?", context="A keeper tends the lamp.", top_k=3)
    """

    def __init__(
        self,
        model: SpanModel | PrefixBank,
        windows: WindowConfig | None = None,
        answers: AnswerConfig | None = None,
        more_answers: Sequence[AnswerConfig] = (),
    ):
        """
        Args:
            windows, answers: how texts are cut and spans chosen.
            more_answers: of a bank, the settings of its second prefix and so on; `answers` alone holds for all.
        """
        self.model, self.windows, self.answers = model.eval(), windows or WindowConfig(), answers or AnswerConfig()
        self.more_answers = tuple(more_answers)
        self.tokenizer = load_tokenizer(model.source)

    @classmethod
    def from_pretrained(cls, path: str | Path | Sequence[str | Path], precision: str = "auto") -> "QuestionAnswerer":
        """Load the checkpoint directory of any method, with the window and answer settings it was trained with.

        Args:
            path: of a checkpoint; several become one bank of prefixes (see `ptv2.bank`).

        Raises:
            InputError: it is broken or does not fit its backbone, or several do not go together.
        """
        if isinstance(path, (str, Path)):
            windows, answers = _read_settings(Path(path))
            return cls(load_model(path, precision=precision).to(default_device()), windows, answers)
        bank = PrefixBank.from_pretrained(path, precision=precision).to(default_device())
        settings = [_read_settings(Path(each)) for each in path]
        windows, answers = settings[0]
        for each, (other_windows, other) in zip(path, settings, strict=True):
            alike = replace(other, allow_no_answer=answers.allow_no_answer, no_answer_threshold=answers.no_answer_threshold)
            if other_windows != windows or alike != answers:
                raise InputError(f"{each} was trained with other window or answer lengths than {path[0]}; load them apart.")
        return cls(bank, windows, answers, [other for _, other in settings[1:]])

    def __call__(self, question: str, context: str, top_k: int = 1) -> list[Answer]:
        """The best answers to a question, best first; character offsets into `context`.

        Raises:
            InputError: question or context is empty or too long, or top_k is below 1.
        """
        if top_k < 1:
            raise InputError(f"top_k is {top_k}; it must be at least 1.")
        return list(self.ask([question], [context])[0].answers[:top_k])

    def ask(
        self, questions: list[str], contexts: list[str], batch_size: int = 32, prefixes: Sequence[int] | None = None
    ) -> list[Prediction]:
        """Predictions for many questions, each about its own context, in batches.

        Args:
            prefixes: of a bank, the prefix that each question is answered with, 0 to N - 1; the first for all if None.
        """
        for question, context in zip(questions, contexts, strict=True):
            _check_text("question", question, MAX_QUESTION_CHARACTERS)
            _check_text("context", context, MAX_CONTEXT_CHARACTERS)
        pairs = enumerate(zip(questions, contexts, strict=True))
        examples = [Example(str(i), "", question, context, ()) for i, (question, context) in pairs]
        with _quiet_datasets():
            features = make_features(examples, self.tokenizer, self.windows, cache=False)
        return self._predict(examples, features, batch_size, iter, prefixes)

    def predict_examples(
        self, examples: list[Example], batch_size: int = 32, progress: Callable = iter, prefixes: Sequence[int] | None = None
    ) -> list[Prediction]:
        """Predictions for examples read from a data set; their windows are cached on disk."""
        features = make_features(examples, self.tokenizer, self.windows)
        return self._predict(examples, features, batch_size, progress, prefixes)

    def _predict(self, examples, features, batch_size, progress, prefixes) -> list[Prediction]:
        configs = (self.answers, *self.more_answers)
        if isinstance(self.model, PrefixBank):
            if len(configs) == 1:
                configs *= len(self.model)
            prefixes = [0] * len(examples) if prefixes is None else prefixes
            if len(prefixes) != len(examples) or not all(0 <= n < len(self.model) for n in prefixes):
                raise InputError(f"prefixes must name one of 0 to {len(self.model) - 1} for each of the {len(examples)} questions.")
        elif prefixes is not None:
            raise InputError("prefixes are for a bank; this is a single model: load several checkpoints to choose among them.")
        return predict(self.model, examples, features, self.tokenizer, configs, batch_size, progress, prefixes)


def _read_settings(path: Path) -> tuple[WindowConfig, AnswerConfig]:
    """How a checkpoint was trained to cut texts and choose spans."""
    described = read_description(path)
    try:
        return WindowConfig(**described.get("windows", {})), AnswerConfig(**described.get("answers", {}))
    except TypeError as error:
        raise InputError(f"{path / DESCRIPTION_FILE} is not a ptv2 description ({error}): save the checkpoint again.") from error


def _check_text(field: str, text: str, limit: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"The {field} is empty; give it a text.")
    if len(text) > limit:
        raise InputError(f"The {field} has {len(text):,} characters; the limit is {limit:,}: shorten it or ask about parts of it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"The {field} is not Unicode text at character {error.start}; give it as UTF-8.") from error


@contextmanager
def _quiet_datasets():
    """No progress bar for the few windows of one question."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
