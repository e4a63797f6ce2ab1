"""`ptv2 bench answer`: windows answered per second in batches, and how long one question takes, with one prefix or many."""

import numpy as np
import torch
from tqdm import tqdm

from ptv2 import records
from ptv2.answers import AnswerConfig, best_spans
from ptv2.backbone import default_device
from ptv2.bench import contenders
from ptv2.bench.rounds import Answers, resident_mib, seconds, spread, start, use_threads
from ptv2.bench.train import Batch, Setting, described, real_batches

LABELS = ("start_positions", "end_positions")


def prepare(name: str, setting: Setting, batches: list[Batch]) -> Answers:
    """A contender in its process, and what it can be asked."""
    device = default_device()
    use_threads(setting.threads)
    before = resident_mib()
    model = contenders.prepared(name, setting.backbone, setting.prefix_length, setting.seed).eval()
    inputs = [{part: tensor.to(device) for part, tensor in batch.items() if part not in LABELS} for batch in batches]
    if contenders.find(name).is_ours:  # neighbours take different prefixes
        for batch in inputs:
            batch["prefix_index"] = torch.arange(len(batch["input_ids"]), device=device) % len(model)
    single = [{part: tensor[i : i + 1] for part, tensor in batch.items()} for batch in inputs for i in range(0, setting.batch_size, 4)]
    for one in single:  # without the padding of the batch that it comes from
        length = int(one["attention_mask"].sum())
        one.update({part: one[part][:, :length] for part in ("input_ids", "attention_mask", "token_type_ids") if part in one})

    @torch.inference_mode()
    def answer(batch: Batch) -> None:
        output = model(**batch)
        best_spans(output.start_logits, output.end_logits, batch["attention_mask"].bool(), AnswerConfig())

    def run() -> None:
        for batch in inputs:
            answer(batch)

    def turn() -> float:
        run()  # untimed: memory is fetched from the system again
        return seconds(run)

    records.reset_peak_memory()
    return {
        "round": turn,
        "latencies": lambda: [seconds(lambda one=one: answer(one)) for one in single],
        "memory": lambda: records.peak_memory_mib() - before,
    }


def bench_answer(setting: Setting, names: list[str], command: str) -> dict:
    """Run the contenders, of `contenders.ANSWERING` and "plain" among them, and return the record."""
    batches = real_batches(setting)
    windows = sum(len(batch["input_ids"]) for batch in batches)
    running = start(names, prepare, setting, batches)
    took: dict[str, list[float]] = {name: [] for name in names}
    latencies: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(setting.rounds), desc="rounds"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took[name].append(running[name].ask("round"))
            latencies[name] += running[name].ask("latencies")
    methods = {
        name: {
            "title": contenders.find(name).title,
            "seconds": took[name],
            "windows_per_second": spread([windows / t for t in took[name]]),
            "of_plain": spread([plain / own for plain, own in zip(took["plain"], took[name], strict=True)]),
            "latency_ms": {f"p{q}": 1000 * float(np.percentile(latencies[name], q)) for q in (50, 95)},
            "memory_mib": round(running[name].ask("memory"), 1),
        }
        for name in names
    }
    for process in running.values():
        process.stop()
    return {
        **records.provenance(command),
        "setting": described(setting),
        "batches": [list(batch["input_ids"].shape) for batch in batches],
        "windows": windows,
        "methods": methods,
    }
