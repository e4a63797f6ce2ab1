"""`ptv2 bench accuracy`: F1 on held-out training articles against the minutes that training took, each method with its own defaults."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from ptv2 import records
from ptv2.answers import AnswerConfig, predict
from ptv2.backbone import default_device, load_tokenizer, resolve_backbone
from ptv2.bench import contenders
from ptv2.bench.rounds import Answers, Process, seconds, use_threads
from ptv2.bench.train import Setting, described
from ptv2.features import LengthGroupedSampler, WindowConfig, collate, make_features
from ptv2.methods import METHODS, build_model
from ptv2.metrics import score
from ptv2.prefix import PrefixConfig
from ptv2.squad import hold_out, load_examples
from ptv2.training import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """A contender with the rates, the batch size and the weight decay that its own authors give.

    Args:
        contender: name in `contenders.TRAINING`.
        rate, head_rate: AdamW's at their highest.
        source: where they come from.
        warmup: share of the time over which the rates rise. They fall to 0 at its end, so that no method is cut off amid a schedule:
        cosine: as half a cosine, rather than linearly.
        weight_decay: AdamW's.
    """

    title: str
    contender: str
    rate: float
    head_rate: float
    batch_size: int
    source: str
    warmup: float = 0.1
    cosine: bool = False
    weight_decay: float = 0.0

    def factor(self, passed: float) -> float:
        """The rates' share of their highest after this share of the time."""
        if passed < self.warmup:
            return passed / self.warmup
        left = max(0.0, (1 - passed) / (1 - self.warmup))
        return (1 - math.cos(math.pi * left)) / 2 if self.cosine else left


_OURS = METHODS["p-tuning-v2"]
_DEFAULT = TrainingConfig()
RECIPES = {
    f"ptv2-{precision}": Recipe(
        f"ptv2, {precision}",
        f"ptv2-{precision}",
        _OURS.learning_rate,
        _OURS.head_learning_rate,
        _DEFAULT.batch_size,
        "this package",
        _OURS.warmup,
        _OURS.schedule == "cosine",
        _OURS.weight_decay,
    )
    for precision in ("fp32", "int8")
} | {
    "peft": Recipe(
        "PEFT prefix tuning",
        "peft-fp32",
        1e-2,
        1e-2,
        8,
        "PEFT's guide to prefix tuning: torch's AdamW at 1e-2, batches of 8; buckets as for ours",
        weight_decay=1e-2,  # torch's own, which the guide leaves
    ),
    "full": Recipe("full fine-tuning", "full-fp32", 1e-4, 1e-4, 16, "the rate and batch size of the recorded runs of this package"),
}


class _Wrapped(nn.Module):
    """A peer's model with what `predict` needs beside the forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def forward(self, **inputs):
        return self.model(**inputs)


def _build(recipe: Recipe, setting: Setting, texts: list[str]) -> nn.Module:
    contender = contenders.find(recipe.contender)
    if contender.is_ours:  # with the initialisation that is its default, which the speed benchmark has no need of
        config = PrefixConfig(prefix_length=setting.prefix_length)
        precision = recipe.contender.removeprefix("ptv2-")
        return build_model("p-tuning-v2", setting.backbone, config, texts=texts, seed=setting.seed, precision=precision)
    return _Wrapped(contenders.prepared(contender.name, setting.backbone, setting.prefix_length, setting.seed))


def prepare(name: str, setting: Setting, budget: float, held_out: float) -> Answers:
    """A method in its process.

    Args:
        budget: seconds of training in all.
        held_out: share of the questions to score on.
    """
    use_threads(setting.threads)
    recipe, device = RECIPES[name], default_device()
    tokenizer = load_tokenizer(resolve_backbone(setting.backbone))
    train, dev = hold_out(load_examples(setting.data, "train"), held_out)
    features, dev_features = (make_features(part, tokenizer, WindowConfig()) for part in (train, dev))
    model = _build(recipe, setting, sorted({example.context for example in train})).to(device).train()
    heads = [p for n, p in model.named_parameters() if p.requires_grad and "qa_outputs" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "qa_outputs" not in n]
    optimiser = torch.optim.AdamW(
        [{"params": others, "lr": recipe.rate}, {"params": heads, "lr": recipe.head_rate}], weight_decay=recipe.weight_decay
    )
    peaks = [group["lr"] for group in optimiser.param_groups]
    batches = _batches(features, tokenizer, recipe.batch_size, setting.seed)
    spent = steps = 0.0

    def step() -> None:
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * recipe.factor(spent / budget)
        batch = {part: tensor.to(device) for part, tensor in next(batches).items()}
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([*others, *heads], 1.0)
        optimiser.step()
        optimiser.zero_grad()

    def train_until(until: float) -> tuple[float, float]:
        nonlocal spent, steps
        while spent < until:
            spent += seconds(step)
            steps += 1
        return spent, steps * recipe.batch_size

    def evaluate() -> float:
        predictions = predict(model, dev, dev_features, tokenizer, [AnswerConfig()])
        model.train()
        return score({e.id: p.best.text for e, p in zip(dev, predictions, strict=True)}, dev).f1.value

    return {"train_until": train_until, "evaluate": evaluate}


def _batches(features, tokenizer, batch_size: int, seed: int):
    """Batches of like lengths, epoch after epoch."""
    sampler = LengthGroupedSampler(features["length"], batch_size, seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = iter(sampler)
        while rows := [features[i] for i in itertools.islice(order, batch_size)]:
            yield collate(rows, tokenizer)


def bench_accuracy(setting: Setting, minutes: float, command: str, evaluations: int = 8, held_out: float = 0.05) -> dict:
    """Train every method of `RECIPES` for the same time, in turn, a slice at a time, and return the record of its curve.

    Args:
        minutes: of training for each method; scoring is not counted.
        evaluations: points of a curve.
        held_out: share of the training questions, by article, that is scored.
    """
    budget = 60 * minutes
    running = {name: Process(prepare, name, setting, budget, held_out) for name in RECIPES}
    for process in running.values():
        process.wait()
    curves: dict[str, list[dict]] = {name: [] for name in RECIPES}
    for part in tqdm(range(1, evaluations + 1), desc="slices"):
        for name, process in running.items():
            spent, windows = process.ask("train_until", budget * part / evaluations)
            curves[name].append({"minutes": spent / 60, "windows": windows, "f1": process.ask("evaluate")})
    for process in running.values():
        process.stop()
    methods = {name: {**vars(recipe), "curve": curves[name]} for name, recipe in RECIPES.items()}
    described_setting = described(replace(setting, batch_size=0, rounds=0))
    kept = {name: value for name, value in described_setting.items() if value or name == "seed"}
    return {**records.provenance(command), "setting": kept, "held_out": held_out, "methods": methods, "sooner": sooner(methods)}


def sooner(methods: dict[str, dict]) -> dict[str, float | None]:
    """How many times sooner than PEFT each method reaches the F1 that PEFT ends with; None where it never does.

    Between two points of a curve F1 is taken to rise linearly; before the first one, from 0.
    """
    end = methods["peft"]["curve"][-1]
    return {
        name: None if (reached := _minutes_to(end["f1"], method["curve"])) is None else end["minutes"] / reached
        for name, method in methods.items()
        if name != "peft"
    }


def _minutes_to(f1: float, curve: list[dict]) -> float | None:
    before = {"minutes": 0.0, "f1": 0.0}
    for point in curve:
        if point["f1"] >= f1:
            share = (f1 - before["f1"]) / (point["f1"] - before["f1"]) if point["f1"] > before["f1"] else 1.0
            return before["minutes"] + share * (point["minutes"] - before["minutes"])
        before = point
    return None
