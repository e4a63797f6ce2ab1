"""Training: records that repeat a run, kills that do not change it, several processes, precisions and refusals."""

import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from conftest import DATA, REPOSITORY
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import TrainerState

from ptv2 import cli, records, training
from ptv2.errors import InputError
from ptv2.features import LengthGroupedSampler, WindowConfig
from ptv2.methods import METHODS
from ptv2.model import DESCRIPTION_FILE
from ptv2.prefix import PrefixConfig
from ptv2.squad import load_examples
from ptv2.training import RUN_FILE, QATrainer, TrainingConfig, train


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """48 answerable questions of the embedded corpus: 48 windows, so 6 steps of 8 an epoch."""
    qas = [example for example in load_examples("embedded", "train") if not example.is_impossible][:48]
    paragraphs = [
        {
            "context": e.context,
            "qas": [{"id": e.id, "question": e.question, "answers": [{"text": s.text, "answer_start": s.start} for s in e.answers]}],
        }
        for e in qas
    ]
    file = tmp_path_factory.mktemp("questions") / "train.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "All", "paragraphs": paragraphs}]}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def make_config(tiny_bert, questions):
    """A run of 12 steps, two epochs, with a checkpoint after each third step; keywords change it."""

    def make(**changes) -> TrainingConfig:
        usual = {
            "backbone": str(tiny_bert), "train_data": (str(questions),), "eval_data": str(DATA / "squad_v1.json"), "batch_size": 8,
            "max_steps": 12, "evaluations": 4, "precision": "fp32", "prefix": PrefixConfig(prefix_length=4, prefix_dropout=0.2),
            "windows": WindowConfig(512, 64, 32),
        }  # fmt: skip
        return TrainingConfig(**{**usual, **changes})

    return make


def run_to(config: TrainingConfig, run: Path) -> dict:
    return train(config, run, cli.command_line(config, run))


def weights_file(run: Path) -> Path:
    (file,) = run.glob("*.safetensors")
    return file


def weights_sha256(run: Path) -> str:
    return hashlib.sha256(weights_file(run).read_bytes()).hexdigest()


def interrupted_run(config: TrainingConfig, run: Path, method: str, call: int) -> None:
    """A run that ends, as by Ctrl-C, when the trainer's `method` is called for the given time."""
    calls = iter(range(1, 1000))
    original = getattr(QATrainer, method)

    def stop(self, *args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QATrainer, method, stop)
        run_to(config, run)
    assert records.read_json(run / RUN_FILE)["status"] == "running"


def f1_by_step(patch: pytest.MonkeyPatch, f1) -> None:
    """Sets what an evaluation finds: a tiny random model's own F1 would make an early step the best by chance."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_exact_match": 0.0, "eval_f1": float(f1(self.state.global_step))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    patch.setattr(QATrainer, "evaluate", evaluate)


@pytest.fixture(scope="module")
def whole_run(make_config, tmp_path_factory) -> Path:
    """The usual run from start to end, the last step its best."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        f1_by_step(patch, lambda step: step)
        run_to(make_config(), run)
    return run


def start(config: TrainingConfig, run: Path, *launcher: str) -> subprocess.Popen:
    """`python -m ptv2 train` in a process of its own."""
    words = [sys.executable, *launcher, "-m", "ptv2", *shlex.split(cli.command_line(config, run))[1:]]
    return subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(exists, process: subprocess.Popen) -> None:
    """SIGKILL as soon as `exists()` is true."""
    while not exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def logged(record: dict, *names: str) -> list[tuple]:
    """The log's entries that have `names`, with their steps."""
    return [(e["step"], *(e[name] for name in names)) for e in record["log_history"] if names[0] in e]


@pytest.mark.parametrize("method", ["p-tuning-v2", "fine-tuning"])
def test_the_recorded_command_repeats_the_weights_bit_for_bit(method, make_config, tmp_path, capsys):
    config = make_config(method=method)
    record = run_to(config, tmp_path / "one")
    words = shlex.split(record["command"])
    assert (words[0], words[-1]) == ("ptv2", str(tmp_path / "one"))
    assert cli.main([*words[1:-1], str(tmp_path / "two")]) == 0
    capsys.readouterr()
    again = records.read_json(tmp_path / "two" / RUN_FILE)
    assert again["config"] == record["config"]
    assert logged(again, "loss", "grad_norm") == logged(record, "loss", "grad_norm")
    assert weights_sha256(tmp_path / "two") == weights_sha256(tmp_path / "one")
    run_to(dataclasses.replace(config, seed=1), tmp_path / "three")
    assert weights_sha256(tmp_path / "three") != weights_sha256(tmp_path / "one")


def test_a_finished_run_holds_weights_and_all_that_repeats_them(make_config, tmp_path):
    config = make_config(max_steps=10)
    record = run_to(config, tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", DESCRIPTION_FILE, RUN_FILE,
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text(encoding="utf-8")) == record
    assert record["status"] == "finished" and record["steps"] == 10
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_commit"] == records.git_commit()
    assert record["machine"] == records.machine()
    for name, source in (("train", config.train_data[0]), ("held_out", config.eval_data)):
        examples = load_examples(source)
        assert record["data"][name] == {"questions": len(examples), "sha256": training.examples_sha256(examples)}
    backbone = (Path(config.backbone) / "model.safetensors").read_bytes()
    assert record["backbone"] == {"name": config.backbone, "sha256": hashlib.sha256(backbone).hexdigest()}
    assert record["parameters"]["trained"] == 4 * 2 * 2 * 32 + 2 * 32 + 2  # P·2·L·E and the head
    assert record["parameters"]["stored_bytes"] == weights_file(tmp_path / "run").stat().st_size
    assert record["wall_seconds"] > 0 and record["peak_memory_mib"] > 100
    assert [step for step, _ in logged(record, "eval_f1")] == [3, 6, 9, 10]
    # The method's own rate and schedule: it rises for 3 of the 10 steps, then falls to 0 as half a cosine.
    rate = METHODS["p-tuning-v2"].learning_rate
    falling = [(step, rate * (1 + math.cos(math.pi * (step - 4) / 7)) / 2) for step in (6, 9, 10)]
    rates = [(3, rate * 2 / 3), *falling]
    assert dict(logged(record, "learning_rate")) == pytest.approx(dict(rates))
    best = max(logged(record, "eval_f1", "eval_exact_match"), key=lambda entry: entry[1])
    assert record["metrics"] == {"step": best[0], "held_out_f1": best[1], "held_out_exact_match": best[2]}


@pytest.mark.parametrize(
    "method, call",
    [
        pytest.param("training_step", 2, id="before any checkpoint"),
        pytest.param("training_step", 8, id="after a checkpoint at an epoch's end"),
        pytest.param("training_step", 11, id="within the second epoch"),
        pytest.param("_save_rng_state", 3, id="while a checkpoint is written"),
        pytest.param("_load_best_model", 1, id="when all is learned"),
    ],
)
def test_a_run_stopped_anywhere_ends_at_the_same_weights_and_log(method, call, make_config, whole_run, tmp_path, monkeypatch):
    f1_by_step(monkeypatch, lambda step: step)
    whole = records.read_json(whole_run / RUN_FILE)
    interrupted_run(make_config(), tmp_path / "cut", method, call)
    resumed = run_to(make_config(), tmp_path / "cut")
    assert weights_sha256(tmp_path / "cut") == weights_sha256(whole_run)
    assert resumed["metrics"] == whole["metrics"] and resumed["metrics"]["step"] == 12
    for names in (("loss", "grad_norm", "learning_rate"), ("eval_f1",)):
        assert logged(resumed, *names) == logged(whole, *names)
    assert not (tmp_path / "cut" / training.CHECKPOINTS).exists()


def test_killed_processes_leave_a_run_that_ends_at_the_same_weights(make_config, tmp_path, monkeypatch):
    config, run = make_config(max_steps=30, evaluations=10), tmp_path / "killed"
    kill_when((run / RUN_FILE).is_file, start(config, run))  # before the first checkpoint
    kill_when(lambda: any(run.glob("checkpoints/*/complete")), start(config, run))
    assert records.read_json(run / RUN_FILE)["status"] == "running"
    f1_by_step(monkeypatch, lambda step: 100 + step)  # above what the processes found
    run_to(config, run)
    run_to(config, tmp_path / "whole")
    assert weights_sha256(run) == weights_sha256(tmp_path / "whole")


def test_a_half_written_checkpoint_is_discarded(make_config, whole_run, tmp_path, monkeypatch):
    f1_by_step(monkeypatch, lambda step: step)
    interrupted_run(make_config(), tmp_path / "cut", "training_step", 11)
    folder = tmp_path / "cut" / training.CHECKPOINTS
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-9"]
    half = folder / "checkpoint-10"
    shutil.copytree(folder / "checkpoint-9", half)
    (half / "complete").unlink()
    (half / "trainer_state.json").unlink()
    os.truncate(half / "model.safetensors", 100)
    run_to(make_config(), tmp_path / "cut")
    assert weights_sha256(tmp_path / "cut") == weights_sha256(whole_run)


def test_the_weights_of_the_best_evaluation_are_kept_also_in_a_run_that_was_cut_off_and_moved(make_config, tmp_path, monkeypatch):
    f1_by_step(monkeypatch, {3: 1, 6: 5, 9: 2, 12: 5}.get)
    saved = {}
    original = QATrainer._save

    def remember(self, output_dir=None, state_dict=None):
        original(self, output_dir, state_dict)
        saved[self.state.global_step] = load_file(Path(output_dir) / "model.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QATrainer, "_save", remember)
        interrupted_run(make_config(method="head-only"), tmp_path / "here", "_load_best_model", 1)
        (tmp_path / "here").rename(tmp_path / "there")
        record = run_to(make_config(method="head-only"), tmp_path / "there")
    assert record["metrics"]["step"] == 6 and record["metrics"]["held_out_f1"] == 5
    kept = load_file(weights_file(tmp_path / "there"))
    same = {step: all(torch.equal(kept[name], state[name]) for name in kept) for step, state in saved.items()}
    assert same == {3: False, 6: True, 9: False, 12: False}


def assert_close_weights(run: Path, other: Path) -> None:
    ours, theirs = load_file(weights_file(run)), load_file(weights_file(other))
    # Adding to all logits changes no loss: the gradient of the head's bias is rounding noise, which Adam makes large.
    for name in ours.keys() - {"base_model.qa_outputs.bias"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


def test_accumulated_gradients_equal_a_larger_batch(make_config, tmp_path):
    usual = {"prefix": PrefixConfig(prefix_length=4), "evaluations": 1}
    one = run_to(make_config(**usual), tmp_path / "one")
    two = run_to(make_config(**usual, batch_size=4, gradient_accumulation=2), tmp_path / "two")
    for (step, loss), (other_step, other_loss) in zip(logged(one, "loss"), logged(two, "loss"), strict=True):
        assert step == other_step and other_loss == pytest.approx(loss, abs=1e-5)
    assert_close_weights(tmp_path / "one", tmp_path / "two")


def test_two_processes_train_as_one_with_the_whole_batch(make_config, tmp_path):
    usual = {"prefix": PrefixConfig(prefix_length=4), "evaluations": 1}
    one = run_to(make_config(**usual), tmp_path / "one")
    # Without a GPU `--multi_gpu` starts processes that speak gloo; with `--cpu` accelerate starts several through MPI alone.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    process = start(make_config(**usual, batch_size=4), tmp_path / "two", *launcher.split(), "--main_process_port", "0")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == 12  # one object, from one process
    two = records.read_json(tmp_path / "two" / RUN_FILE)
    for (step, loss), (other_step, other_loss) in zip(logged(one, "loss"), logged(two, "loss"), strict=True):
        assert step == other_step and other_loss == pytest.approx(loss, abs=1e-5)
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


def test_two_processes_go_on_in_the_order_of_the_epoch_they_were_stopped_in():
    lengths = [7 * i % 30 for i in range(48)]
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    shard = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes=2, process_index=1)
    loader = DataLoaderShard(list(range(48)), batch_sampler=shard)
    callback = training._RunCallback(Path(), {"wall_seconds": 0.0})
    callback.on_epoch_begin(None, TrainerState(epoch=1.5), None, train_dataloader=loader)
    rest = skip_first_batches(loader, 3)
    rest.set_epoch(1)  # as Trainer does
    seen = [batch.tolist() for batch in rest]
    alone = LengthGroupedSampler(lengths, 8, seed=0)
    alone.set_epoch(1)
    order = list(alone)
    assert seen == [order[i + 4 : i + 8] for i in range(3 * 8, 48, 8)]


@pytest.mark.parametrize("method", ["p-tuning-v2", "fine-tuning"])
def test_bf16_trains_with_losses_near_those_of_fp32(method, make_config, tmp_path):
    usual = {"method": method, "prefix": PrefixConfig(prefix_length=4), "evaluations": 1, "max_steps": 6}
    exact = [loss for _, loss in logged(run_to(make_config(**usual), tmp_path / "fp32"), "loss")]
    record = run_to(make_config(**usual, precision="bf16"), tmp_path / "bf16")
    losses = [loss for _, loss in logged(record, "loss")]
    assert record["dtype"] == "bfloat16"
    assert losses == pytest.approx(exact, rel=0.03) and losses != exact
    assert {tensor.dtype for tensor in load_file(weights_file(tmp_path / "bf16")).values()} == {torch.float32}


def test_held_out_questions_share_no_article_with_the_training_ones(make_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "examples_sha256", lambda examples: seen.append(examples) or "")
    record = run_to(make_config(train_data=("embedded",), eval_data=None, held_out=0.1, max_steps=1), tmp_path / "run")
    trained, held_out = seen
    assert not {e.title for e in trained} & {e.title for e in held_out}
    assert sorted(e.id for e in trained + held_out) == sorted(e.id for e in load_examples("embedded", "train"))
    assert record["data"]["held_out"]["questions"] == pytest.approx(0.1 * len(trained + held_out), rel=0.3)


def test_a_part_of_the_questions_leaves_those_held_out_as_they_are(make_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "examples_sha256", lambda examples: seen.append([e.id for e in examples]) or "")
    usual = {"train_data": ("embedded",), "eval_data": None, "max_steps": 1, "evaluations": 1}
    for i, (count, seed) in enumerate([(0, 0), (40, 0), (40, 1)]):
        record = run_to(make_config(max_train_questions=count, seed=seed, **usual), tmp_path / str(i))
        assert record["data"]["train"]["questions"] == len(seen[2 * i]) == (count or len(seen[0]))
    everything, held_out, few, same, others, also = seen
    assert held_out == same == also
    assert set(few) < set(everything) and set(others) < set(everything) and few != others


@pytest.mark.parametrize("eval_data", [None, "embedded"])
def test_unanswerable_questions_can_be_left_out(eval_data, make_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "examples_sha256", lambda examples: seen.append(examples) or "")
    config = make_config(train_data=("embedded",), eval_data=eval_data, answerable_only=True, max_steps=1, evaluations=1)
    run_to(config, tmp_path / "run")
    trained, held_out = seen
    wanted = load_examples("embedded", "train") + (load_examples("embedded", "dev") if eval_data else [])
    assert any(e.is_impossible for e in wanted)
    assert sorted(e.id for e in trained + held_out) == sorted(e.id for e in wanted if not e.is_impossible)


def test_leaving_unanswerable_questions_out_of_data_without_others_is_refused(make_config, tmp_path):
    paragraph = {"context": "A text.", "qas": [{"id": "1", "question": "Who?", "answers": [], "is_impossible": True}]}
    file = tmp_path / "none.json"
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    with pytest.raises(InputError, match="holds no answerable questions, and answerable_only is on"):
        run_to(make_config(train_data=(str(file),), answerable_only=True), tmp_path / "run")


def test_learning_rates_and_decay_reach_their_parameters(make_config, tmp_path, monkeypatch):
    found, original = {}, QATrainer.create_optimizer

    def remember(self, model=None):
        optimiser = original(self, model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimiser.param_groups:
            found.update({names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]})
        return optimiser

    monkeypatch.setattr(QATrainer, "create_optimizer", remember)
    for method in ("fine-tuning", "p-tuning-v2"):
        found.clear()
        config = make_config(method=method, max_steps=1, learning_rate=1e-3, head_learning_rate=2e-3, weight_decay=0.1)
        record = run_to(config, tmp_path / method)
        weights = {name: (2e-3 if name.startswith("qa_outputs") else 1e-3, 0.1) for name in found}
        plain = {name: (rate, 0.0) for name, (rate, _) in weights.items() if name.endswith(".bias") or "LayerNorm" in name}
        assert found == {**weights, **plain}
        assert len(found) == (3 if method == "p-tuning-v2" else 39)
        assert record["parameters"]["trained"] > record["parameters"]["head"]


def test_a_finished_run_is_returned_as_it_is(make_config, tmp_path):
    record = run_to(make_config(), tmp_path / "run")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    assert run_to(make_config(), tmp_path / "run") == record
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == before


def test_a_directory_with_other_things_is_refused_and_untouched(make_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match=r"is not a run of ptv2; choose another output directory"):
            run_to(make_config(), place)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("thesis.txt", "years of work")]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": 3}, "seed = 0, not 3"),
        ({"prefix": PrefixConfig(prefix_length=5, prefix_dropout=0.2)}, "prefix = .*'prefix_length': 4.* not .*'prefix_length': 5"),
    ],
)
def test_a_run_with_another_config_is_refused_naming_the_option(changes, said, make_config, tmp_path):
    interrupted_run(make_config(), tmp_path / "run", "training_step", 2)
    with pytest.raises(InputError, match=said + ".*choose another output directory"):
        run_to(make_config(**changes), tmp_path / "run")


def test_a_run_from_before_a_field_existed_goes_on_as_it_began(make_config, tmp_path):
    config = make_config(schedule="linear")
    interrupted_run(config, tmp_path / "run", "training_step", 2)
    record = records.read_json(tmp_path / "run" / RUN_FILE)
    del record["config"]["schedule"]
    records.write_json(tmp_path / "run" / RUN_FILE, record)
    with pytest.raises(InputError, match="schedule = linear, not cosine"):
        run_to(make_config(), tmp_path / "run")
    assert run_to(config, tmp_path / "run")["status"] == "finished"


def test_what_is_left_open_is_the_methods_own(make_config):
    for method, schedule, warmup, decay in (("p-tuning-v2", "cosine", 0.3, 0.01), ("fine-tuning", "linear", 0.1, 0.0)):
        config = make_config(method=method)
        assert (config.schedule, config.warmup, config.weight_decay) == (schedule, warmup, decay)
        assert config.learning_rate == METHODS[method].learning_rate
    given = make_config(schedule="constant", warmup=0.0, weight_decay=0.0)
    assert (given.schedule, given.warmup, given.weight_decay) == ("constant", 0.0, 0.0)


@pytest.mark.parametrize(
    "changes, kind",
    [({}, "AdamW"), ({"optimizer": "adafactor"}, "Adafactor"), ({"optimizer": "rmsprop"}, "RMSprop")],
)
def test_the_optimiser_is_the_one_named(changes, kind, make_config, tmp_path, monkeypatch):
    seen = []
    original = QATrainer.create_optimizer
    monkeypatch.setattr(QATrainer, "create_optimizer", lambda self, model=None: seen.append(original(self, model)) or seen[-1])
    run_to(make_config(max_steps=1, **changes), tmp_path / "run")
    assert {type(optimiser).__name__ for optimiser in seen} == {kind}


@pytest.mark.parametrize(("schedule", "halfway", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_the_rate_falls_as_the_schedule_says(schedule, halfway, end, make_config, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        training._RunCallback,
        "on_step_end",
        lambda self, args, state, control, lr_scheduler, **kwargs: rates.append(lr_scheduler.get_last_lr()[0]),
    )
    run_to(make_config(schedule=schedule, warmup=0.0, max_steps=8, learning_rate=1.0, evaluations=1), tmp_path / "run")
    assert rates[3] == pytest.approx(halfway) and rates[7] == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("changed", ["data", "backbone"])
def test_a_run_continued_on_other_data_or_weights_is_refused(changed, make_config, tmp_path, tiny_bert, questions):
    data, backbone = tmp_path / "train.json", tmp_path / "backbone"
    shutil.copy(questions, data)
    shutil.copytree(tiny_bert, backbone)
    config = make_config(train_data=(str(data),), backbone=str(backbone))
    interrupted_run(config, tmp_path / "run", "training_step", 2)
    file = data if changed == "data" else backbone / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"?", b"!", 1) if changed == "data" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="was started on other data, another backbone's weights or in another precision"):
        run_to(config, tmp_path / "run")


def test_a_run_continued_on_a_machine_with_another_fast_precision_is_refused(make_config, tmp_path, monkeypatch):
    config = make_config(precision="auto")
    interrupted_run(config, tmp_path / "run", "training_step", 2)
    here = records.read_json(tmp_path / "run" / RUN_FILE)["dtype"]
    elsewhere = torch.float32 if here == "bfloat16" else torch.bfloat16
    monkeypatch.setattr(training, "fast_dtype", lambda precision: elsewhere)
    with pytest.raises(InputError, match=r"was started .* in another precision"):
        run_to(config, tmp_path / "run")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"method": "magic"}, 'method is "magic"; choose one of p-tuning-v2, fine-tuning'),
        ({"train_data": ()}, "train_data is empty; name a file"),
        *[
            ({name: 0}, f"{name} is 0; it must be at least 1")
            for name in ("batch_size", "gradient_accumulation", "evaluations", "lora_rank")
        ],
        *[
            ({name: bad}, f"{name} is {bad}; it must be 0 or more")
            for name in ("learning_rate", "head_learning_rate", "weight_decay", "max_grad_norm")
            for bad in (-1, float("nan"), float("inf"))
        ],
        *[({name: -1}, f"{name} is -1; it must be 0 or more") for name in ("max_steps", "max_train_questions", "seed")],
        ({"seed": 2**32}, "seed is 4294967296; it must be below"),
        *[({"epochs": bad}, f"epochs is {bad}; it must be above 0") for bad in (0, -1.0, float("nan"), float("inf"))],
        *[({"warmup": bad}, f"warmup is {bad}; it must be at least 0 and below 1") for bad in (-0.1, 1, float("nan"))],
        *[({"held_out": bad, "eval_data": None}, f"held_out is {bad}; it must be above 0 and below 1") for bad in (0, 1, float("nan"))],
        ({"optimizer": "adam"}, 'optimizer is "adam"; choose one of adamw, adafactor, rmsprop'),
        ({"schedule": "step"}, 'schedule is "step"; choose one of linear, cosine, constant'),
        ({"precision": "fp8"}, 'precision is "fp8"; it must be "auto", "fp32", "bf16" or "int8"'),
    ],
)
def test_a_value_out_of_range_has_its_sentence(changes, said, make_config):
    with pytest.raises(InputError, match=said):
        make_config(**changes)


def test_one_source_of_training_data_may_be_a_plain_string():
    assert TrainingConfig(train_data="embedded") == TrainingConfig(train_data=["embedded"]) == TrainingConfig()


def test_an_id_in_two_training_files_is_refused(make_config, questions, tmp_path):
    copy = tmp_path / "copy.json"
    shutil.copy(questions, copy)
    with pytest.raises(InputError, match=r"question id \S+ stands in more than one of .*train.json, .*copy.json; name each question once"):
        run_to(make_config(train_data=(str(questions), str(copy))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
