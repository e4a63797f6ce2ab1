"""The trained models behind the page: loaded when first asked, kept a while, and asked by one thread at a time.

Prefixes and heads on the same backbone are answered in one pass (`ptv2.bank`). This module needs torch; the page imports
it after it is up.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from demo.checkpoints import Checkpoint
from ptv2.answers import Prediction, QuestionAnswerer
from ptv2.bank import BANKABLE
from ptv2.checkpoint import read_description
from ptv2.errors import InputError
from ptv2.features import collate, make_features
from ptv2.inside import attention_to_prefix
from ptv2.model import PrefixModelForQuestionAnswering
from ptv2.squad import Example

KEPT = 4  # groups of models in memory; each holds a backbone


@dataclass(frozen=True)
class Reply:
    """What one method says to a question.

    Args:
        prediction: None where it could not be asked; `error` then says why.
        seconds: of the pass that answered it.
        in_pass: how many methods were answered in this pass.
        declines: it may say that the text holds no answer.
        trained: how many numbers were trained.
        share: these over the backbone's.
    """

    checkpoint: Checkpoint
    prediction: Prediction | None = None
    error: str = ""
    seconds: float = 0.0
    in_pass: int = 1
    declines: bool = False
    trained: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Inside:
    """What happens in a prefix model while it reads one window of the text.

    Args:
        attention: share of attention that goes to the prefix, 0 to 1, mean over the window's tokens, float [N, H].
        tokens: character range of each of the text's tokens in this window, S of them.
        start, end: probability that the answer starts, or ends, at each of these tokens, float [S] each.
        windows: how many windows the text has; this one holds the answer.
    """

    attention: Tensor
    tokens: list[tuple[int, int]]
    start: list[float]
    end: list[float]
    windows: int


class Models:
    """All checkpoints that have been asked lately."""

    def __init__(self):
        self._lock = threading.Lock()  # tokenizers and the notes of a forward pass are not for several threads
        self._kept: OrderedDict[tuple, QuestionAnswerer] = OrderedDict()

    def compare(self, question: str, context: str, checkpoints: Sequence[Checkpoint]) -> list[Reply]:
        """A reply of each checkpoint, in order."""
        answered = self.ask([question], [context], checkpoints)
        return [answered[checkpoint.name][0] for checkpoint in checkpoints]

    def ask(self, questions: list[str], contexts: list[str], checkpoints: Sequence[Checkpoint]) -> dict[str, list[Reply]]:
        """Replies to many questions by checkpoint name; a checkpoint that fails leaves the others alone."""
        with self._lock:
            replies: dict[str, list[Reply]] = {}
            for group in _groups(checkpoints):
                replies |= self._ask_group(questions, contexts, group)
            return replies

    def _ask_group(self, questions: list[str], contexts: list[str], group: list[Checkpoint]) -> dict[str, list[Reply]]:
        try:
            answerer = self._answerer(group)
            begun = time.perf_counter()
            n = len(questions)
            prefixes = [i for i in range(len(group)) for _ in questions] if len(group) > 1 else None
            predictions = answerer.ask(questions * len(group), contexts * len(group), prefixes=prefixes)
            seconds = time.perf_counter() - begun
            facts = [_facts(answerer, checkpoint) for checkpoint in group]
        except (InputError, OSError, SafetensorError) as error:
            if len(group) == 1:
                return {group[0].name: [Reply(group[0], error=str(error).replace(str(group[0].path), group[0].name))] * len(questions)}
            one_by_one = [self._ask_group(questions, contexts, [checkpoint]) for checkpoint in group]
            return {name: replies for part in one_by_one for name, replies in part.items()}
        return {
            checkpoint.name: [
                Reply(checkpoint, prediction, seconds=seconds, in_pass=len(group), **fact)
                for prediction in predictions[i * n : (i + 1) * n]
            ]
            for i, (checkpoint, fact) in enumerate(zip(group, facts, strict=True))
        }

    def _answerer(self, group: list[Checkpoint]) -> QuestionAnswerer:
        """The group's models, from memory where nothing has changed on disk."""
        for checkpoint in group:
            if not checkpoint.path.is_dir():
                raise InputError(f"{checkpoint.name} is no longer there: choose another method.")
        paths = [checkpoint.path for checkpoint in group]
        return self._keep(
            tuple((checkpoint.path, checkpoint.changed) for checkpoint in group),
            lambda: QuestionAnswerer.from_pretrained(paths if len(paths) > 1 else paths[0]),
        )

    def _keep(self, key: tuple, load: Callable[[], QuestionAnswerer]) -> QuestionAnswerer:
        if key not in self._kept:
            self._kept[key] = load()
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def look_inside(self, question: str, context: str, checkpoint: Checkpoint) -> Inside:
        """What happens in a prefix model in the window that holds its answer.

        Raises:
            InputError: it is not a prefix model, or cannot be loaded.
        """
        with self._lock:
            answerer = self._answerer([checkpoint])
            if not isinstance(answerer.model, PrefixModelForQuestionAnswering):
                raise InputError(f"{checkpoint.name} has no prefix to look at: choose a P-tuning v2 method.")
            best = answerer.ask([question], [context])[0].best_span
            features = make_features([Example("", "", question, context, ())], answerer.tokenizer, answerer.windows, cache=False)
            holding = [row for row in features if best.start in row["context_start"] and best.end in row["context_end"]]
            row = holding[0] if holding else features[0]
            batch = collate([row], answerer.tokenizer)
            attention = attention_to_prefix(answerer.model, batch).by_head()
            with torch.inference_mode():
                inputs = {name: tensor for name, tensor in batch.items() if not name.endswith("_positions")}
                output = answerer.model(**{name: tensor.to(answerer.model.backbone.device) for name, tensor in inputs.items()})
        return _inside(row, attention, output.start_logits[0].cpu(), output.end_logits[0].cpu(), len(features))


def _inside(row: dict, attention: Tensor, start_logits: Tensor, end_logits: Tensor, windows: int) -> Inside:
    text = [i for i, start in enumerate(row["context_start"]) if start >= 0]
    tokens = [(row["context_start"][i], row["context_end"][i]) for i in text]
    start, end = (logits.softmax(-1)[text].tolist() for logits in (start_logits, end_logits))
    return Inside(attention, tokens, start, end, windows)


def _groups(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Those that can share a pass through their backbone, together; each other one alone."""
    groups: dict[object, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        groups.setdefault(_backbone(checkpoint) if checkpoint.method in BANKABLE else checkpoint.name, []).append(checkpoint)
    return list(groups.values())


def _backbone(checkpoint: Checkpoint) -> tuple:
    try:
        return "backbone", str(read_description(checkpoint.path)["backbone"]["sha256"])
    except (InputError, KeyError, TypeError, OSError):  # said when it is loaded
        return "unreadable", checkpoint.name


def _facts(answerer: QuestionAnswerer, checkpoint: Checkpoint) -> dict:
    """How much was trained, and whether it may decline."""
    if checkpoint.method in BANKABLE:
        with safe_open(next(checkpoint.path.glob("*.safetensors")), "pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
        trained = sum(torch.Size(shape).numel() for shape in shapes)
    else:
        trained = sum(answerer.model.get_parameter(name).numel() for name in answerer.model.trained_names)
    backbone = sum(parameter.numel() for parameter in answerer.model.backbone.parameters())
    declines = bool(read_description(checkpoint.path).get("answers", {}).get("allow_no_answer"))
    return {"trained": trained, "share": trained / backbone, "declines": declines}


MODELS = Models()
