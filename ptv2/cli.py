"""The commands: progress and logs on stderr, results on stdout; exit status 0, 1 (failed) or 2 (bad usage or input)."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import tomllib
import types
import typing
from pathlib import Path

# Nothing here is sent out unasked, and forked tokeniser threads are not needed for windows that are cached.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ptv2
from ptv2 import records, serve
from ptv2.answers import AnswerConfig, QuestionAnswerer
from ptv2.bench import command as bench
from ptv2.errors import InputError
from ptv2.evaluation import evaluation_record, published_record
from ptv2.features import WindowConfig
from ptv2.methods import count_parameters
from ptv2.prefix import PrefixConfig
from ptv2.pretraining import PretrainingConfig
from ptv2.squad import Example, draw_examples, load_examples
from ptv2.training import TrainingConfig, read_questions, show_progress, train


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else arguments  # as they were given, for records
    try:
        return options.run_command(options) or 0
    except InputError as error:
        print(f"ptv2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if options.run_command in (_train, _pretrain, _sweep) else ""
        print(f"\nptv2: stopped{goes_on}.", file=sys.stderr)  # a progress bar may have the line before
        return 1
    except OSError as error:
        print(f"ptv2: {error}.", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ptv2", description=ptv2.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run_command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run_command=run_command)
        return added

    added = command("train", _train, "Train a method on questions; a run that was cut off goes on.")
    for config in _CONFIGS:
        _add_options(added, config)
    added.add_argument("--output-dir", required=True, type=Path, help="the run's directory, new or of the same run")

    added = command("pretrain", _pretrain, "Train a method on questions made from plain text, for --init; a run that was cut off goes on.")
    for config in (PretrainingConfig, *_CONFIGS):
        _add_options(added, config)
    added.add_argument("--show", type=int, metavar="N", help="print N of the questions as a JSON list, and stop")
    added.add_argument("--output-dir", type=Path, help="the run's directory, new or of the same run; needed but for --show")

    added = command("evaluate", _evaluate, "Score a run on questions: one JSON object on stdout.")
    _add_run_and_data(added)
    added.add_argument("--output", type=Path, help="also write the object, with the scores of every question, to this file")

    added = command("predict", _predict, "Write answers in the official form, {question id: text}.")
    _add_run_and_data(added)
    added.add_argument("--output", required=True, type=Path, help="file to write")
    added.add_argument("--n-best-output", type=Path, help="also write every question's n best answers to this file")

    added = command("score", _score, "Score answers from elsewhere, such as a published system's: one JSON object on stdout.")
    added.add_argument("predictions", type=Path, help="{question id: answer} as JSON or gzip, or one such object for each system")
    added.add_argument("--data", required=True, help="the questions: SQuAD file, hub data set or embedded (its dev part)")
    added.add_argument("--source", default="", help="where the predictions come from")
    added.add_argument("--licence", default="", help="of the predictions")
    added.add_argument("--output", type=Path, help="also write the object to this file")

    added = command("answer", _answer, "Answer one question: a JSON list, best first, on stdout.")
    added.add_argument("run", type=Path, help="a run's or checkpoint's directory")
    added.add_argument("--question", required=True)
    added.add_argument("--context", required=True, help='the text, or "-" to read it from stdin')
    added.add_argument("--top-k", type=int, default=1, help="how many answers (default 1)")
    _add_options(added, AnswerConfig, stored=True)

    added = command("params", _params, "Count a run's parameters: one JSON object on stdout.")
    added.add_argument("run", type=Path, help="a run's or checkpoint's directory")

    added = command("sweep", _sweep, "Work on a sweep of runs, alone or beside other processes; one that was cut off goes on.")
    added.add_argument("spec", type=Path, help="its specification (TOML; see notebooks/sweeps)")
    added.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="in place of the specification's, such as config.max_steps=20"
    )
    added.add_argument("--runs", type=Path, help="folder of the runs (default runs/sweeps/NAME)")
    added.add_argument(
        "--storage", help="what the workers share: a file, or a database's URL as Optuna takes it (default RUNS/journal.log)"
    )
    added.add_argument("--limit", type=int, metavar="N", help="take up at most N runs; 0 only exports")
    added.add_argument("--export", type=Path, metavar="FILE", help="after each run, bring this record up to date")
    added.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="records of other machines to join with it")

    added = command("bench", _bench, bench.DESCRIPTION)
    bench.add_options(added)

    added = command("demo", serve.serve, serve.DESCRIPTION)
    serve.add_options(added)

    added = command("notebooks", _notebooks, "Run the notebook suite and write one HTML report.")
    added.add_argument("--profile", default="quick", help="parameters: quick (default), or another in profiles.toml")
    added.add_argument("--only", nargs="+", metavar="NN", help="only the notebooks whose names begin so, such as 03")
    added.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    added.add_argument("--jobs", type=int, default=1, help="notebooks at once, which share the cores (default 1)")
    added.add_argument("--output-dir", type=Path, help="the run's folder (default runs/notebooks/PROFILE)")
    added.add_argument("--notebooks-dir", type=Path, default=Path("notebooks"), help="the suite's folder (default notebooks)")
    added.add_argument("--record", action="store_true", help="record the values in results/notebooks/PROFILE.json")
    added.add_argument("--store", action="store_true", help="put the outputs, cleaned, back into the suite")

    added = command("export", _export, "Write a run of full fine-tuning as an 8-bit difference to its backbone: a small checkpoint.")
    added.add_argument("run", type=Path, help="a run's or checkpoint's directory")
    added.add_argument("--delta", action="store_true", required=True, help="as a difference, which is the one form there is")
    added.add_argument("--output", required=True, type=Path, help="directory to write")
    added.add_argument(
        "--texts", nargs="+", default=["embedded"], metavar="NAME",
        help="questions like those that will be asked, to know frequent words by; as for --data (default embedded)",
    )  # fmt: skip
    added.add_argument("--word-rows", type=int, default=1024, help="rows of the word embeddings to keep (default 1024)")

    added = command("report", _report, "Tabulate records as Markdown on stdout, and draw them.")
    added.add_argument("records", type=Path, nargs="+", help="runs, or directories of them; or JSON files that are records of sweeps")
    added.add_argument("--figure", type=Path, help="draw F1 against trained numbers, and the training curves, here (SVG and PNG)")
    added.add_argument(
        "--into",
        type=Path,
        help="put the table between <!-- results --> and <!-- /results --> of this Markdown file (a sweep's: <!-- sweep: NAME -->)",
    )
    added.add_argument(
        "--starts", action="store_true", help="the sweeps are over starts and numbers of questions: one table of all (<!-- starts -->)"
    )
    added.add_argument(
        "--gains", metavar="POINT", help="how a sweep's other points do beside this one, seed by seed (<!-- gains: NAME -->)"
    )
    return parser


def _add_run_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's or checkpoint's directory")
    parser.add_argument("--data", default="embedded", help="SQuAD file, hub data set or embedded (default; its dev part)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows per forward pass (default 32)")
    _add_options(parser, AnswerConfig, stored=True)


_CONFIGS = (TrainingConfig, PrefixConfig, WindowConfig)
_SAID = ("method", "train_data", "seed", "objective", "prefix_length")  # in a recorded command even at their defaults
_NESTED = {"prefix": PrefixConfig, "windows": WindowConfig, "pretraining": PretrainingConfig}


def _option(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def _fields(config: type) -> list[dataclasses.Field]:
    """A config's plain fields; those that hold another config are that one's options."""
    return [field for field in dataclasses.fields(config) if field.name not in _NESTED]


def _add_options(parser: argparse.ArgumentParser, config: type, stored: bool = False) -> None:
    """One option per field, typed by its annotation, explained by the class's own docstring.

    Args:
        stored: without the option, what the checkpoint was saved with holds, rather than the class's default.
    """
    hints, help_of = typing.get_type_hints(config), _argument_help(config)
    group = parser.add_argument_group(config.__name__)
    for field in _fields(config):
        kind, many = _kind(hints[field.name])
        default = None if stored else field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "as trained" if stored else default
        text = f"{help_of[field.name]} (default: {'none' if shown is None else shown})".replace("%", "%%")
        if kind is bool:
            group.add_argument(_option(field.name), action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            group.add_argument(
                _option(field.name), type=kind, default=default, help=text, nargs="+" if many else None,
                metavar={int: "N", float: "X", str: "NAME"}[kind],
            )  # fmt: skip


def _kind(hint) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether several values are given: `tuple[int, ...] | None` is (int, True)."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _argument_help(config: type) -> dict[str, str]:
    section = re.search(r"Args:\n(.*?)(\n\s*\n|\Z)", config.__doc__, re.S).group(1)
    entries = re.findall(r"^        (\w+): (.*?)(?=^        \w|\Z)", section, re.S | re.M)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def config_from(options: argparse.Namespace) -> TrainingConfig:
    """The training config that a command line asks for."""
    configs = (*_CONFIGS, *([PretrainingConfig] if options.run_command is _pretrain else []))
    values = {config: {field.name: getattr(options, field.name) for field in _fields(config)} for config in configs}
    nested = {name: config(**values[config]) for name, config in _NESTED.items() if config in configs}
    return TrainingConfig(**values[TrainingConfig], **nested)


def command_line(config: TrainingConfig, run: Path) -> str:
    """The command that repeats a training run: every option that differs from its default, and those whose default may change."""
    words = ["ptv2", "pretrain" if config.pretraining else "train"]
    for holder in (config, config.prefix, config.windows, *([config.pretraining] if config.pretraining else [])):
        for field in _fields(type(holder)):
            value = getattr(holder, field.name)
            if value == field.default and field.name not in _SAID:
                continue
            words += _words(field.name, value)
    return shlex.join([*words, "--output-dir", str(run)])


def _words(name: str, value: object) -> list[str]:
    """A field and its value as they are typed."""
    if isinstance(value, bool):
        return [_option(name if value else f"no_{name}")]
    return [_option(name), *map(str, value if isinstance(value, tuple) else (value,))]


def _given(options: argparse.Namespace) -> dict[str, object]:
    """The answer settings that the command line gives in place of the stored ones."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(AnswerConfig)}
    return {name: value for name, value in values.items() if value is not None}


def _train(options: argparse.Namespace) -> None:
    config = config_from(options)
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log lines
        record = train(config, options.output_dir, command_line(config, options.output_dir))
    if int(os.environ.get("RANK", 0)) == 0:
        _print_json({"run": str(options.output_dir), "wall_seconds": record["wall_seconds"], **record["metrics"]})


def _pretrain(options: argparse.Namespace) -> None:
    if options.show is not None:
        if options.show < 1:
            raise InputError(f"--show is {options.show}; it must be at least 1.")
        made = read_questions(config_from(options))["train"]
        shown = draw_examples(made, min(options.show, len(made)), options.seed)
        _print_json([dataclasses.asdict(example) for example in shown])
    elif options.output_dir is None:
        raise InputError("Give --output-dir, the run's directory, or --show to print examples alone.")
    else:
        _train(options)


def _answerer(options: argparse.Namespace, precision: str = "auto") -> QuestionAnswerer:
    answerer = QuestionAnswerer.from_pretrained(options.run, precision)
    answerer.answers = dataclasses.replace(answerer.answers, **_given(options))
    return answerer


def _questions(options: argparse.Namespace) -> tuple[QuestionAnswerer, list[Example], list]:
    if options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}; it must be at least 1.")
    answerer = _answerer(options, "fp32")  # "auto" would let scores depend on the machine
    examples = load_examples(options.data, "dev")
    return answerer, examples, answerer.predict_examples(examples, options.batch_size, show_progress)


def _evaluate(options: argparse.Namespace) -> None:
    answerer, examples, predictions = _questions(options)
    words = ["ptv2", "evaluate", str(options.run), "--data", options.data]
    for name, value in _given(options).items():
        words += _words(name, value)
    record = evaluation_record(options.run, answerer, options.data, examples, predictions, shlex.join(words))
    if options.output:
        records.write_json(options.output, record)
    _print_json({name: value for name, value in record.items() if name != "questions"})


def _predict(options: argparse.Namespace) -> None:
    _, examples, predictions = _questions(options)
    records.write_json(options.output, {e.id: p.best.text for e, p in zip(examples, predictions, strict=True)})
    if options.n_best_output:
        lists = {e.id: [dataclasses.asdict(answer) for answer in p.answers] for e, p in zip(examples, predictions, strict=True)}
        records.write_json(options.n_best_output, lists)


def _score(options: argparse.Namespace) -> None:
    words = ["ptv2", "score", str(options.predictions), "--data", options.data, "--source", options.source, "--licence", options.licence]
    record = published_record(options.predictions, options.data, options.source, options.licence, shlex.join(words))
    if options.output:
        records.write_json(options.output, record)
    _print_json(record)


def _answer(options: argparse.Namespace) -> None:
    context = _read_stdin() if options.context == "-" else options.context
    answers = _answerer(options)(options.question, context, options.top_k)
    _print_json([dataclasses.asdict(answer) for answer in answers])


def _read_stdin() -> str:
    """All of stdin as it is: reading it as text would turn CRLF into LF and so move the answers' offsets."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The text on stdin is not UTF-8 ({error.reason} at byte {error.start}); convert it first.") from error


def _params(options: argparse.Namespace) -> None:
    answerer = QuestionAnswerer.from_pretrained(options.run, precision="fp32")
    stored = sum(file.stat().st_size for file in options.run.glob("*.safetensors"))
    counted = count_parameters(answerer.model, stored)
    _print_json({**dataclasses.asdict(counted), "share_of_backbone": counted.share})


def _export(options: argparse.Namespace) -> None:
    from ptv2.delta import export_delta

    examples = [example for source in options.texts for example in load_examples(source)]
    texts = sorted({text for example in examples for text in (example.context, example.question)})
    words = ["ptv2", "export", str(options.run), "--delta", "--output", str(options.output), "--texts", *options.texts]
    command = shlex.join([*words, "--word-rows", str(options.word_rows)])
    _print_json(export_delta(options.run, options.output, texts, options.word_rows, command))


def _bench(options: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        record = bench.bench(options, shlex.join(["ptv2", *options.words]))
    if record is not None:
        _print_json(record)


def _sweep(options: argparse.Namespace) -> None:
    from ptv2.sweeps import read_sweep

    try:
        from ptv2.workers import Worker
    except ModuleNotFoundError as error:
        raise InputError(f"Sweeps need the package {error.name}: install ptv2[notebooks].") from error
    sweep = read_sweep(options.spec, dict(map(_assignment, options.set)))
    folder = options.runs or Path("runs") / "sweeps" / sweep.name
    worker = Worker(sweep, folder, options.storage or str(folder / "journal.log"))
    words = ["ptv2", "sweep", str(options.spec), *(word for given in options.set for word in ("--set", given))]

    def export() -> None:
        if options.export:
            worker.export(options.export, shlex.join([*words, "--export", str(options.export)]), tuple(options.merge))

    with contextlib.redirect_stdout(sys.stderr):
        failed = worker.work(options.limit, export)
        export()
    finished = len(worker.record("")["trials"])
    _print_json({"sweep": sweep.name, "runs": len(sweep.points) * len(sweep.seeds), "finished": finished, "failed": failed})


def _assignment(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value in TOML's form; what is none, such as a path, is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: write NAME=VALUE.")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _notebooks(options: argparse.Namespace) -> int:
    try:
        from ptv2 import notebook_report, notebook_runner, notebooks
    except ModuleNotFoundError as error:
        raise InputError(f"Notebooks need the package {error.name}: install ptv2[notebooks].") from error
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}; it must be at least 1.")
    if options.store and (options.profile != "quick" or options.parameters):
        raise InputError("--store keeps the outputs of the quick profile as it is; leave --profile and -p out.")
    planned = notebooks.plan(options.notebooks_dir, options.profile, options.only, dict(options.parameters))
    words = ["ptv2", "notebooks", "--profile", options.profile, *(word for pair in options.parameters for word in ("-p", *pair))]
    run = options.output_dir or Path("runs") / "notebooks" / options.profile
    outcomes = notebook_runner.run_notebooks(planned, run, options.jobs, shlex.join(words))
    written = notebook_runner.record(planned, outcomes) if options.record else []
    if options.store:
        written += notebook_runner.store(planned, outcomes, run)
    for path in written:
        print(f"Written: {path}", file=sys.stderr)
    report = notebook_report.write_report(run)
    lines, status = notebook_runner.summary(outcomes)
    print(*lines[:-1], f"Report: {report}", lines[-1], sep="\n")
    return status


def _report(options: argparse.Namespace) -> None:
    from ptv2.plots import draw_comparison  # matplotlib is slow to import
    from ptv2.report import few_shot_table, gains_table, put_into, read_results, results_table, sweep_table

    if options.starts or any(path.suffix == ".json" for path in options.records):
        from ptv2.sweep_scores import join_by_start
        from ptv2.sweeps import read_sweep_record

        sweeps = {file.stem: read_sweep_record(file) for file in options.records}
        if options.starts:
            tables = {"starts": few_shot_table(join_by_start(list(sweeps.values())))}
        elif options.gains:
            tables = {f"gains: {name}": gains_table(record, options.gains) for name, record in sweeps.items()}
        else:
            tables = {f"sweep: {name}": sweep_table(record) for name, record in sweeps.items()}
        for mark, table in tables.items():
            print(table)
            if options.into:
                put_into(options.into, table, f"<!-- {mark} -->", f"<!-- /{mark} -->")
        return
    results = read_results(options.records)
    table = results_table(results)
    print(table)
    if options.into:
        put_into(options.into, table)
    if options.figure:
        draw_comparison(results, options.figure)


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))
