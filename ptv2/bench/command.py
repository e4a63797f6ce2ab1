"""The command `ptv2 bench`: options, tables on stderr, one JSON object on stdout, a plot where one is wanted."""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch

from ptv2 import records
from ptv2.backbone import DEFAULT_BACKBONE, fast_dtype
from ptv2.bench.shapes import SHAPES, write_backbone
from ptv2.errors import InputError

DESCRIPTION = "Measure speed and memory beside the peers, in turn: one JSON object on stdout, a table on stderr."
KINDS = {
    "train": "training steps on real batches, and the share of the machine's limit that ours reaches",
    "answer": "answering in batches and one by one, with one prefix and with many mixed",
    "scale": "time and memory against prefix length, text length, batch size and data",
    "leads": "ways to make a step faster that were tried, against what is done",
    "accuracy": "F1 on held-out articles against minutes, each method with its own defaults",
    "report": "no measurement: draw recorded ones, and put their tables into Markdown files",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `ptv2 bench` takes."""
    parser.add_argument("kind", choices=KINDS, help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()))
    parser.add_argument("--records", type=Path, default=Path("results/speed"), help="of report: their folder (default results/speed)")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="of report: Markdown files that have places for the tables")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help=f"directory or hub name (default {DEFAULT_BACKBONE})")
    parser.add_argument("--shape", choices=SHAPES, help="instead of a backbone: random weights of this one's shape")
    parser.add_argument("--data", default="embedded", help="SQuAD file, hub data set or embedded (default)")
    parser.add_argument("--batch-size", type=int, help="windows per step (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender, from a batch of short texts to long (default 5)")
    parser.add_argument("--prefix-length", type=int, default=16, help="default 16")
    parser.add_argument("--threads", type=int, default=0, help="default one for each core")
    parser.add_argument("--minutes", type=float, default=15.0, help="of accuracy: training time of each method (default 15)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of train and answer: only these contenders")
    parser.add_argument("--quick", action="store_true", help="small batches, and only dtypes that the machine has built in: under 90 s")
    parser.add_argument("--output", type=Path, help="also write the object to this file")
    parser.add_argument("--plot", type=Path, help="draw it here (SVG and PNG)")


def bench(options: argparse.Namespace, command: str) -> dict | None:
    """Run the benchmark that was asked for and return its record, if there is one; the table goes to stderr."""
    from ptv2.bench import tables
    from ptv2.bench.train import Setting

    if options.kind == "report":
        tables.report(options.records, options.into)
        return None
    for name, least in (("batch_size", 1), ("rounds", 1), ("prefix_length", 1), ("threads", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
    if not options.minutes > 0:
        raise InputError(f"--minutes is {options.minutes}; it must be above 0.")
    names = {field.name for field in dataclasses.fields(Setting)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    setting = Setting(**({"batch_size": 4} if options.quick else {}) | given)
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            if options.kind == "accuracy":
                raise InputError("--shape has random weights, and accuracy trains in earnest; give it a --backbone.")
            write_backbone(options.shape, Path(folder))
            setting = dataclasses.replace(setting, backbone=folder)
        record = _run(options, setting, command)
    if options.shape:
        record["setting"]["backbone"] = f"random weights, shape of {options.shape}"
    print(tables.table(record), file=sys.stderr)
    if options.output:
        records.write_json(options.output, record)
    if options.plot:
        tables.draw(record, options.plot)
    return record


def _run(options: argparse.Namespace, setting, command: str) -> dict:
    # PEFT and the models are imported only for what is asked.
    if options.kind == "train":
        from ptv2.bench.train import bench_train

        return bench_train(setting, _chosen(options), command)
    if options.kind == "answer":
        from ptv2.bench.answer import bench_answer

        return bench_answer(setting, _chosen(options), command)
    if options.kind == "scale":
        from ptv2.bench.scale import GRIDS, bench_scale

        grids = {name: (values[0], values[len(values) // 2]) for name, values in GRIDS.items()} if options.quick else GRIDS
        return bench_scale(setting, grids, command)
    if options.kind == "leads":
        from ptv2.bench.leads import bench_leads

        return bench_leads(setting, command)
    from ptv2.bench.accuracy import bench_accuracy

    return bench_accuracy(setting, 0.05 if options.quick else options.minutes, command)


def _chosen(options: argparse.Namespace) -> list[str]:
    """The contenders that were named, or all that the time and the machine allow."""
    from ptv2.bench.contenders import ANSWERING, TRAINING

    names = [contender.name for contender in (TRAINING if options.kind == "train" else ANSWERING)]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        raise InputError(f"--only names {sorted(unknown)[0]}; choose from {', '.join(names)}.")
    if options.only:
        return [name for name in names if name in options.only or name == "plain"]  # answering is measured against it
    slow_bf16 = fast_dtype("auto") != torch.bfloat16  # it would take most of the time, and show only that it is missing
    left_out = {name for name in names if options.quick and slow_bf16 and name.endswith("bf16")}
    left_out |= {"ptv2-int8"} if torch.cuda.is_available() else set()
    return [name for name in names if name not in left_out]
