"""`ptv2 bench train`: the same batches through every way to train, in turn; memory; and how near ours comes to the machine's limit."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ptv2 import records
from ptv2.backbone import default_device, fast_dtype, load_tokenizer, resolve_backbone
from ptv2.bench import contenders
from ptv2.bench.rounds import Answers, Process, resident_mib, seconds, spread, start, use_threads
from ptv2.features import LengthGroupedSampler, WindowConfig, collate, make_features
from ptv2.squad import load_examples

Batch = dict[str, Tensor]
DTYPES = {"ptv2-fp32": torch.float32, "ptv2-bf16": torch.bfloat16, "ptv2-int8": torch.int8}


@dataclass(frozen=True)
class Setting:
    """What a benchmark runs on.

    Args:
        backbone: directory or hub name.
        data: questions whose windows are trained on; SQuAD file, hub data set or "embedded".
        batch_size: windows per step.
        rounds: how often each contender's turn comes; each round has a batch of its own.
        prefix_length: P.
        threads: per process; 0 for as many as there are cores.
        seed: of the order and the models.
    """

    backbone: str
    data: str = "embedded"
    batch_size: int = 32
    rounds: int = 5
    prefix_length: int = 16
    threads: int = 0
    seed: int = 0


def described(setting: Setting) -> dict:
    """For the record: the data by its name alone, and the threads that were used."""
    return {**vars(setting), "data": Path(setting.data).name, "threads": setting.threads or torch.get_num_threads()}


def real_batches(setting: Setting) -> list[Batch]:
    """A batch for each round as training makes them, of windows of like lengths: those at the middle of equal parts, short to long."""
    tokenizer = load_tokenizer(resolve_backbone(setting.backbone))
    features = make_features(load_examples(setting.data, "train"), tokenizer, WindowConfig())
    order = iter(LengthGroupedSampler(features["length"], setting.batch_size, setting.seed))
    groups = list(iter(lambda: list(itertools.islice(order, setting.batch_size)), []))
    lengths = features["length"]
    full = sorted((g for g in groups if len(g) == len(groups[0])), key=lambda group: sum(lengths[i] for i in group))
    places = [int((i + 0.5) * len(full) / setting.rounds) for i in range(setting.rounds)]
    return [collate([features[i] for i in full[place]], tokenizer) for place in places]


def prepare(name: str, setting: Setting, batches: list[Batch]) -> Answers:
    """A contender in its process, and what it can be asked."""
    contender, device = contenders.find(name), default_device()
    use_threads(setting.threads)
    before = resident_mib()
    model = contenders.prepared(name, setting.backbone, setting.prefix_length, setting.seed).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    wide = [{name: _padded(part, contender.padded_to).to(device) for name, part in batch.items()} for batch in batches]

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=contender.autocast):
            loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def turn(i: int) -> float:
        step(wide[i])  # untimed: memory is fetched from the system again, and kernels are compiled
        return seconds(lambda: step(wide[i]))

    records.reset_peak_memory()
    answers = {"round": turn, "memory": lambda: records.peak_memory_mib() - before}
    return {**answers, **_limits(model, step, wide, DTYPES[name])} if contender.is_ours else answers


def _padded(part: Tensor, length: int | None) -> Tensor:
    """[B, S] to [B, length] with zeros, which are padding in ids, mask and segments alike; labels [B] as they are."""
    return part if length is None or part.dim() == 1 else torch.nn.functional.pad(part, (0, length - part.shape[1]))


def _limits(model, step: Callable[[Batch], None], batches: list[Batch], dtype: torch.dtype) -> Answers:
    """What only ours is asked: the least work of a round, the machine's product rate, and where the time goes."""
    from ptv2.bench import roofline

    layers = roofline.linear_layers(model, batches[0])
    return {
        "work": lambda i: roofline.least_work(layers, batches[i]["attention_mask"].sum(1).tolist(), model).total,
        "rate": lambda i: roofline.product_rate(layers, batches[i]["input_ids"].numel(), dtype, default_device()),
        "profile": lambda: roofline.profile_step(step, batches[len(batches) // 2]),
    }


def bench_train(setting: Setting, names: list[str], command: str) -> dict:
    """Run the contenders and return the record.

    Args:
        names: of `contenders.TRAINING`; those whose dtype the machine can't do are left out and named.
    """
    batches = real_batches(setting)
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    running = start(names, prepare, setting, batches)
    ours = [name for name in names if contenders.find(name).is_ours]
    took: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in ours}
    for turn in tqdm(range(setting.rounds), desc="rounds"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took[name].append(running[name].ask("round", turn))
            if name in ours:
                rates[name].append(running[name].ask("rate", turn))
    methods = {
        name: {
            "title": contenders.find(name).title,
            "seconds": took[name],
            "examples_per_second": spread([setting.batch_size / t for t in took[name]]),
            "tokens_per_second": spread([n / t for n, t in zip(tokens, took[name], strict=True)]),
            "memory_mib": round(running[name].ask("memory"), 1),
        }
        for name in names
    }
    limits = {name: _share_of_limit(running[name], took[name], rates[name]) for name in ours}
    for process in running.values():
        process.stop()
    return {
        **records.provenance(command),
        "setting": described(setting),
        "built_in": str(fast_dtype("auto")).removeprefix("torch."),
        "batches": [list(batch["input_ids"].shape) for batch in batches],
        "tokens": tokens,
        "methods": methods,
        "ratios": {name: _ratios(took, name) for name in ours},
        "limits": limits,
    }


def _ratios(took: dict[str, list[float]], name: str) -> dict[str, dict[str, float]]:
    """How many times as fast as each other contender, round by round."""
    others = (other for other in took if other != name)
    return {other: spread([theirs / own for theirs, own in zip(took[other], took[name], strict=True)]) for other in others}


def _share_of_limit(process: Process, took: list[float], rates: list[float]) -> dict:
    """The least time that the step's work could take at the product rate of the same round, over the time that it took."""
    work = [process.ask("work", i) for i in range(len(took))]
    return {
        "operations": work,
        "product_rate": spread(rates),
        "share": spread([w / rate / t for w, rate, t in zip(work, rates, took, strict=True)]),
        "profile": process.ask("profile"),
    }
