"""The command line: results on stdout, the rest on stderr, exit status 0, 1 or 2, and a command that says a whole config."""

import dataclasses
import io
import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA, REPOSITORY
from safetensors import safe_open

from ptv2 import cli
from ptv2.answers import QuestionAnswerer
from ptv2.evaluation import unpack_scores
from ptv2.features import WindowConfig
from ptv2.metrics import score, score_each
from ptv2.model import DESCRIPTION_FILE
from ptv2.prefix import PrefixConfig
from ptv2.pretraining import PretrainingConfig
from ptv2.squad import load_examples
from ptv2.training import TrainingConfig

V1, V2 = DATA / "squad_v1.json", DATA / "squad_v2.json"


def train_words(backbone: Path, data: Path, run: Path) -> list[str]:
    return [
        "train", "--backbone", str(backbone), "--train-data", str(data), "--eval-data", str(data), "--max-steps", "8", "--batch-size", "4",
        "--prefix-length", "3", "--evaluations", "4", "--precision", "fp32", "--output-dir", str(run),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_bert, tmp_path_factory) -> Path:
    """A run trained on SQuAD 1.1 questions."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(train_words(tiny_bert, V1, path)) == 0
    return path


@pytest.fixture(scope="module")
def run_v2(tiny_bert, tmp_path_factory) -> Path:
    """A run trained on SQuAD 2.0 questions, with a threshold at which it declines to answer some of them."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(train_words(tiny_bert, V2, path)) == 0
    odds = [p.no_answer_odds for p in QuestionAnswerer.from_pretrained(path, "fp32").predict_examples(load_examples(V2))]
    described = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    described["answers"]["no_answer_threshold"] = statistics.median_low(odds)
    (path / DESCRIPTION_FILE).write_text(json.dumps(described), encoding="utf-8")
    return path


@pytest.fixture
def call(capfd):
    """Runs a command in this process: exit status, stdout, stderr, down to the file descriptors."""

    def command(*words) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as left:
            status = left.code
        return status, *capfd.readouterr()

    return command


def ptv2_process(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ptv2", *words]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_runs_as_a_module_and_lists_the_commands():
    process = ptv2_process("--help")
    out, err = process.communicate()
    assert process.returncode == 0 and not err
    for name in ("train", "evaluate", "predict", "answer", "params"):
        assert re.search(rf"^ +{name} ", out, re.M)


def test_a_process_ends_with_status_2_and_one_line_on_bad_input(tmp_path):
    process = ptv2_process("evaluate", str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 2 and not out
    assert re.fullmatch(r"ptv2: .* holds no ptv2\.json: it is not a checkpoint of ptv2\.\n", err)


def test_an_interrupt_leaves_a_run_that_goes_on(tiny_bert, tmp_path, call):
    words = train_words(tiny_bert, V1, tmp_path / "run")
    words[words.index("--max-steps") + 1] = "100"
    process = ptv2_process(*words)
    while not any(tmp_path.glob("run/checkpoints/*/complete")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 1 and not out
    assert "\nptv2: stopped; the same command goes on from the last checkpoint.\n" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    status, out, err = call(*words)
    assert status == 0 and "'epoch': '25'" not in err and "'epoch': '50'" in err  # the first checkpoint, at step 25, was not made again
    assert json.loads(out)["run"] == str(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 100


def test_train_prints_one_object_and_its_progress_elsewhere(tiny_bert, tmp_path, call):
    words = train_words(tiny_bert, V1, tmp_path / "run")
    status, out, err = call(*words)
    told = json.loads(out)
    assert status == 0 and set(told) == {"run", "wall_seconds", "held_out_exact_match", "held_out_f1", "step"}
    assert "'loss'" in err and "8/8" in err
    assert call(*words)[:2] == (0, out)  # the run is finished: told again, not trained again
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"].startswith("ptv2 train --method p-tuning-v2 ")


@pytest.mark.parametrize("data", [V1, V2], ids=["SQuAD 1.1", "SQuAD 2.0"])
def test_evaluate_and_predict_agree_with_the_metrics(data, run, run_v2, tmp_path, call):
    trained = run if data is V1 else run_v2
    status, out, err = call("evaluate", trained, "--data", data, "--output", tmp_path / "scores" / "evaluation.json")
    assert status == 0 and "answer" in err
    told, examples = json.loads(out), load_examples(data)
    written = json.loads((tmp_path / "scores" / "evaluation.json").read_text(encoding="utf-8"))
    each = dict(zip(("exact_match", "f1"), unpack_scores(written), strict=True))
    assert {name: value for name, value in written.items() if name != "questions"} == told
    status, out, _ = call("predict", trained, "--data", data, "--output", tmp_path / "p.json", "--n-best-output", tmp_path / "n.json")
    assert (status, out) == (0, "")
    predictions = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert list(predictions) == [example.id for example in examples]
    expected = score(predictions, examples).to_dict()
    assert {name: told[name] for name in expected} == expected
    for name, scores in zip(("exact_match", "f1"), score_each(predictions, examples), strict=True):
        assert each[name] == pytest.approx(scores, abs=1e-4)
    assert told["n"] == len(examples) and told["data"] == data.name and told["method"] == "p-tuning-v2"
    lists = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert {which: answers[0]["text"] for which, answers in lists.items()} == predictions
    for name in ("has_answer_exact_match", "has_answer_f1", "no_answer_exact_match", "best_f1", "best_f1_threshold"):
        assert (name in told) == (data is V2)
    if data is V2:
        assert 0 < sum(text == "" for text in predictions.values()) < len(examples)
        assert told["best_f1"] >= told["f1"]["value"] - 1e-6


def test_answer_prints_a_list_of_answers(run, call):
    context = "The ☃ keeper tends the lamp, in Aalsund."
    status, out, _ = call("answer", run, "--question", "Who tends it?", "--context", context, "--top-k", "3")
    answers = json.loads(out)
    assert status == 0 and len(answers) == 3
    assert answers == [dataclasses.asdict(a) for a in QuestionAnswerer.from_pretrained(run)("Who tends it?", context, top_k=3)]


def test_answer_settings_on_the_command_line_go_before_the_stored_ones(run_v2, tmp_path, call):
    given = ["--no-answer-threshold", "-1000000", "--n-best", "3", "--max-answer-length", "2"]
    status, out, _ = call("evaluate", run_v2, "--data", V2, *given)
    told = json.loads(out)
    assert status == 0
    assert told["answers"] == {"max_answer_length": 2, "n_best": 3, "allow_no_answer": True, "no_answer_threshold": -1e6}
    assert told["no_answer_exact_match"] == 100  # every question is declined
    assert json.loads(call(*shlex.split(told["command"])[1:])[1])["answers"] == told["answers"]
    words = ["predict", run_v2, "--data", V2, "--output", tmp_path / "p.json", "--n-best-output", tmp_path / "n.json"]
    assert call(*words, *given, "--no-allow-no-answer")[0] == 0
    lists = json.loads((tmp_path / "n.json").read_text(encoding="utf-8")).values()
    assert all(len(answers) == 3 and all(answer["text"] for answer in answers) for answers in lists)
    status, out, err = call("evaluate", run_v2, "--data", V2, "--n-best", "0")
    assert (status, out) == (2, "") and "n_best is 0; it must be at least 1" in err


def test_a_context_on_stdin_is_taken_as_it_is(run, call, monkeypatch):
    context = "First line.\r\nThe keeper — 李明 — tends the lamp.\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(context.encode()), encoding="ascii"))
    status, out, _ = call("answer", run, "--question", "Who?", "--context", "-", "--top-k", "20")
    assert status == 0
    for answer in json.loads(out):
        assert answer["text"] == context[answer["start"] : answer["end"]]
    assert json.loads(out) == json.loads(call("answer", run, "--question", "Who?", "--context", context, "--top-k", "20")[1])


def test_params_counts_what_is_stored(run, call):
    status, out, _ = call("params", run)
    told = json.loads(out)
    with safe_open(run / "adapter_model.safetensors", "pt") as stored:
        numbers = sum(stored.get_tensor(name).numel() for name in stored.keys())  # noqa: SIM118
    assert status == 0 and told["trained"] == numbers == told["formula"] + told["head"]
    assert told["stored_bytes"] == (run / "adapter_model.safetensors").stat().st_size
    assert told["share_of_backbone"] == told["trained"] / told["backbone"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["train"],
        ["train", "--output-dir", "x", "--wings", "2"],
        ["train", "--output-dir", "x", "--method", "magic", "--prefix-len", "2"],
        ["train", "--output-dir", "x", "--epochs", "many"],
        ["train", "--output-dir", "x", "--batch-size", "1.5"],
        ["train", "--output-dir", "x", "--train-data"],
        ["evaluate"],
        ["predict", "run"],
        ["answer", "run", "--question", "Who?"],
        ["answer", "run", "--question", "Who?", "--context", "Me.", "--top-k", "few"],
    ],
    ids=shlex.join,
)
def test_bad_usage_ends_with_status_2(words, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*words)
    assert status == 2 and not out and err.startswith("usage: ptv2") and ": error: " in err
    assert not list(tmp_path.iterdir())


def _file(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def _truncated(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    (to / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes()[:-8])
    return to


V1_TEXT = V1.read_text(encoding="utf-8")
# What a user can get wrong: (words, with the run and an empty folder to write into; part of the sentence).
BAD_INPUT = {
    "a missing data file": (lambda run, tmp: ["evaluate", run, "--data", tmp / "no.json"], r"no\.json does not exist"),
    "broken JSON": (lambda run, tmp: ["evaluate", run, "--data", _file(tmp / "d.json", V1_TEXT[:-9])], r"d\.json is not valid JSON"),
    "a wrong span": (
        lambda run, tmp: ["predict", run, "--output", tmp / "p", "--data", _file(tmp / "d.json", V1_TEXT.replace(": 59", ": 58"))],
        "question cafe-1: .*correct answer_start",
    ),
    "an empty question in a file": (
        lambda run, tmp: ["evaluate", run, "--data", _file(tmp / "d.json", V1_TEXT.replace("Who owns the place?", " "))],
        "cafe-1: the question is empty",
    ),
    "an empty question": (lambda run, tmp: ["answer", run, "--question", " ", "--context", "A text."], "The question is empty"),
    "top_k of 0": (lambda run, tmp: ["answer", run, "--question", "Who?", "--context", "Me.", "--top-k", 0], "top_k is 0"),
    "a missing run": (lambda run, tmp: ["params", tmp / "nowhere"], r"nowhere holds no ptv2\.json"),
    "a truncated checkpoint": (lambda run, tmp: ["evaluate", _truncated(run, tmp / "run")], "is not a whole safetensors file"),
    "a batch size of 0": (lambda run, tmp: ["evaluate", run, "--batch-size", 0], "batch_size is 0; it must be at least 1"),
    "an unknown method": (lambda run, tmp: ["train", "--output-dir", tmp / "new", "--method", "magic"], "choose one of p-tuning-v2"),
    "a value out of range": (lambda run, tmp: ["train", "--output-dir", tmp / "new", "--prefix-length", 0], "prefix_length is 0"),
    "an unknown backbone": (
        lambda run, tmp: ["train", "--output-dir", tmp / "new", "--backbone", "nobody/nothing"],
        'The backbone "nobody/nothing" was not found',
    ),
    "missing training data": (lambda run, tmp: ["train", "--output-dir", tmp / "new", "--train-data", tmp / "no.json"], "does not exist"),
    "a directory of something else": (
        lambda run, tmp: ["train", "--output-dir", _file(tmp / "thesis", "years").parent],
        "is not a run of ptv2; choose another output directory",
    ),
    "a run of another config": (lambda run, tmp: ["train", "--output-dir", run], "holds a run with backbone = "),
}


@pytest.mark.parametrize("words, said", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_with_status_2_and_one_sentence(words, said, run, tmp_path, call):
    before = {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    status, out, err = call(*words(run, tmp_path))
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"ptv2: .*{said}.*\n", err)  # one line
    assert not (tmp_path / "new").exists() and not (tmp_path / "p").exists()
    assert {file.name: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_a_text_on_stdin_that_is_not_utf8_has_its_sentence(run, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Løvås".encode("latin-1"))))
    status, out, err = call("answer", run, "--question", "Who?", "--context", "-")
    assert (status, out) == (2, "") and re.fullmatch(r"ptv2: The text on stdin is not UTF-8 .* at byte 1\).*\n", err)


@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
def test_an_output_that_cannot_be_written_has_its_sentence(command, run, tiny_bert, tmp_path, call):
    place = _file(tmp_path / "a file", "kept") / "below"
    words = train_words(tiny_bert, V1, place) if command == "train" else [command, run, "--data", V1, "--output", place]
    status, out, err = call(*words)
    assert (status, out) == (1, "")
    assert re.match(r"ptv2: .*a file.*\.$", err.splitlines()[-1]) and "Traceback" not in err
    assert (tmp_path / "a file").read_text() == "kept"


CHANGED = {
    TrainingConfig: {
        "method": "prompt-tuning", "backbone": "my models/Bé rt", "train_data": ("a b.json", "embedded"), "eval_data": "d.json",
        "answerable_only": True,
        "held_out": 0.1 + 0.2, "max_train_questions": 40,
        "epochs": 1.5, "max_steps": 7, "batch_size": 3, "gradient_accumulation": 2, "learning_rate": 1e-7,
        "head_learning_rate": 1 / 3, "weight_decay": 0.01,
        "optimizer": "rmsprop", "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.5, "evaluations": 2, "seed": 11,
        "precision": "bf16", "lora_rank": 4,
    },
    PrefixConfig: {
        "prefix_length": 5, "prefix_projection": True, "prefix_hidden_size": 9, "prefix_dropout": 0.25, "init": "normal",
        "layers": (0, 3), "shift_positions": True,
    },
    WindowConfig: {"max_length": 200, "stride": 50, "max_question_length": 30},
    PretrainingConfig: {"objective": "cloze", "questions_per_text": 3, "max_texts": 50},
}  # fmt: skip


def test_the_command_line_of_a_config_means_that_config(call, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "train", lambda config, run, command: asked.append((config, run)) or {"wall_seconds": 0, "metrics": {}})
    nested = {
        "prefix": PrefixConfig(**CHANGED[PrefixConfig]),
        "windows": WindowConfig(**CHANGED[WindowConfig]),
        "pretraining": PretrainingConfig(**CHANGED[PretrainingConfig]),
    }
    changed = TrainingConfig(**CHANGED[TrainingConfig], **nested)
    for holder in (changed, changed.prefix, changed.windows, changed.pretraining):  # a new field must be added above
        for field in dataclasses.fields(holder):
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            assert getattr(holder, field.name) != default, field.name
    for config in (TrainingConfig(), changed, *(TrainingConfig(**{name: part}) for name, part in nested.items())):
        words = shlex.split(cli.command_line(config, Path("my runs") / "one"))
        assert words[0] == "ptv2" and call(*words[1:])[0] == 0
        assert asked.pop() == (config, Path("my runs") / "one")


@pytest.mark.parametrize(("command", "more"), [("train", ()), ("pretrain", (PretrainingConfig,))])
def test_every_option_is_explained(command, more, call):
    status, out, _ = call(command, "--help")
    assert status == 0
    for config in (TrainingConfig, PrefixConfig, WindowConfig, *more):
        for field in dataclasses.fields(config):
            if field.name not in ("prefix", "windows", "pretraining"):
                assert re.search(rf"--{field.name.replace('_', '-')}\b.*?\(default:", out, re.S)
