"""`ptv2 bench scale`: time and memory of ours against prefix length, text length, batch size and the size of the data set."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ptv2 import records
from ptv2.backbone import default_device, load_tokenizer, resolve_backbone
from ptv2.bench import contenders
from ptv2.bench.rounds import Answers, Process, resident_mib, seconds, spread, use_threads
from ptv2.bench.train import Batch, Setting, described
from ptv2.features import LengthGroupedSampler, WindowConfig, collate, make_features
from ptv2.squad import load_examples

TEXT_LENGTH = 192  # where another quantity is varied
GRIDS = {
    "prefix length": (1, 4, 16, 64, 128, 256),
    "text length": (64, 128, 192, 256, 384, 512),
    "batch size": (1, 2, 4, 8, 16, 32, 64),
    "questions": (1_000, 4_000, 16_000),
}
METHODS = ("ptv2-fp32", "full-fp32")


def drawn_batch(backbone: str, batch_size: int, length: int, seed: int) -> Batch:
    """A batch of this exact shape: tokens drawn at random, as only the shape matters for time and memory."""
    tokenizer = load_tokenizer(resolve_backbone(backbone))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(tokenizer.all_special_ids), len(tokenizer), (batch_size, length), generator=generator)
    labels = torch.randint(0, length, (2, batch_size), generator=generator)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "start_positions": labels[0], "end_positions": labels[1]}


def prepare(name: str, setting: Setting, length: int) -> Answers:
    """One contender at one point of a grid, in its process."""
    device = default_device()
    use_threads(setting.threads)
    before = resident_mib()
    model = contenders.prepared(name, setting.backbone, setting.prefix_length, setting.seed).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = {part: tensor.to(device) for part, tensor in drawn_batch(setting.backbone, setting.batch_size, length, 0).items()}

    def step() -> None:
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    records.reset_peak_memory()

    def turn() -> float:
        step()  # untimed: memory is fetched from the system again
        return seconds(step)

    return {"round": turn, "memory": lambda: records.peak_memory_mib() - before}


def prepare_data(setting: Setting, questions: int) -> Answers:
    """A data set of this many questions (the data's own, again and again) on its way into batches."""
    found = load_examples(setting.data, "train")
    examples = [replace(found[i % len(found)], id=str(i)) for i in range(questions)]
    tokenizer = load_tokenizer(resolve_backbone(setting.backbone))
    make_features(examples, tokenizer, WindowConfig())  # the windows lie on disk from here on
    before = _private_mib()

    def read() -> None:
        """One pass over the batches, as training makes them."""
        features = make_features(examples, tokenizer, WindowConfig())
        order = iter(LengthGroupedSampler(features["length"], setting.batch_size, setting.seed))
        while rows := [features[i] for i in itertools.islice(order, setting.batch_size)]:
            collate(rows, tokenizer)

    return {"round": lambda: seconds(read), "memory": lambda: _private_mib() - before}


def _private_mib() -> float:
    """Memory of this process in MiB that is not a file's, which the system gives back when it needs room."""
    status = Path("/proc/self/status")  # Linux
    if not status.is_file():
        return resident_mib()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text()).group(1)) / 1024


def bench_scale(setting: Setting, grids: dict[str, tuple[int, ...]], command: str) -> dict:
    """Run every point of the grids in a process of its own and return the record.

    Args:
        setting: what is not varied; texts then have `TEXT_LENGTH` tokens.
        grids: quantity -> its values, as in `GRIDS`.
    """
    curves = {}
    for quantity, values in grids.items():
        names = ("data",) if quantity == "questions" else METHODS
        points = [(name, value) for value in values for name in names]
        curves[quantity] = [_point(setting, quantity, *point) for point in tqdm(points, desc=quantity)]
    return {**records.provenance(command), "setting": described(setting), "text_length": TEXT_LENGTH, "curves": curves}


def _point(setting: Setting, quantity: str, name: str, value: int) -> dict:
    """What one contender takes at one value."""
    if quantity == "questions":
        process = Process(prepare_data, setting, value)
    elif quantity == "text length":
        process = Process(prepare, name, setting, value)
    else:
        process = Process(prepare, name, replace(setting, **{quantity.replace(" ", "_"): value}), TEXT_LENGTH)
    process.wait()
    took = [process.ask("round") for _ in range(setting.rounds)]
    memory = process.ask("memory")
    process.stop()
    return {"name": name, "value": value, "seconds": spread(took), "memory_mib": round(memory, 1)}
