"""Sweeps: what a specification means, workers that share one and survive each other's death, and the record that is left."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import DATA, REPOSITORY
from optuna.trial import TrialState

from ptv2 import cli, records, workers
from ptv2.errors import InputError
from ptv2.sweeps import differences, make_config, merge_records, read_sweep, read_sweep_record
from ptv2.training import RUN_FILE, TrainingConfig
from ptv2.workers import Worker, finish

SPECS = sorted((REPOSITORY / "notebooks" / "sweeps").glob("*.toml"))
QUESTIONS = str(DATA / "squad_v1.json")
GRID = """
question = "Why?"
seeds = [0, 1]
evaluation = "{questions}"
[config]
backbone = "{backbone}"
train_data = ["{questions}"]
eval_data = "{questions}"
max_steps = 4
evaluations = 2
precision = "fp32"
prefix.prefix_length = 3
[grid]
learning_rate = [0.1, 0.01]
prefix.init = ["normal", "zero"]
"""
SEARCH = """
trials = 4
[config]
prefix.prefix_length = 3
[search]
learning_rate = {low = 1e-3, high = 1e-1, log = true}
batch_size = {low = 2, high = 16, step = 2}
prefix.init = {choices = ["normal", "zero"]}
"""


@pytest.fixture
def spec(tiny_bert, tmp_path) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(GRID.format(questions=QUESTIONS, backbone=tiny_bert))
    return file


@pytest.fixture
def search_spec(tmp_path) -> Path:
    file = tmp_path / "search.toml"
    file.write_text(SEARCH)
    return file


@pytest.fixture
def trained(monkeypatch) -> list[TrainingConfig]:
    """Training that only takes note of what it is asked, and finds an F1 that depends on the learning rate."""
    asked = []

    def train(config: TrainingConfig, run: Path, command: str) -> dict:
        asked.append(config)
        f1 = 100 * config.learning_rate
        return {
            "config": config.to_dict(), "command": command, "finished": "2026-01-01", "steps": 4, "wall_seconds": 1.5,
            "peak_memory_mib": 200.0, "parameters": {"trained": 10, "backbone": 100, "stored_bytes": 40}, "dtype": "float32",
            "data": {"train": {"questions": 9, "sha256": "t"}, "held_out": {"questions": 3, "sha256": "h"}},
            "metrics": {"held_out_f1": f1, "held_out_exact_match": f1 / 2}, "log_history": [{"step": 4, "eval_f1": f1}],
            "backbone": {"name": "tiny", "sha256": "b"}, "versions": {}, "git_commit": None, "machine": {},
        }  # fmt: skip

    monkeypatch.setattr(workers, "train", train)
    monkeypatch.setattr(workers, "_evaluation", lambda run, data: None)
    return asked


def worker(spec: Path, changes: dict | None = None, patience: float = 120.0) -> Worker:
    return Worker(read_sweep(spec, changes), spec.parent / "runs", str(spec.parent / "journal.log"), patience)


def finished(spec: Path) -> list[str]:
    return [f"{trial['point']}, {trial['seed']}" for trial in worker(spec).record("")["trials"]]


ORDER = [f"learning_rate={rate}, init={init}, {seed}" for seed in (0, 1) for rate in (0.1, 0.01) for init in ("normal", "zero")]


def test_a_grid_is_the_full_product_in_the_order_that_it_is_written_in(spec):
    sweep = read_sweep(spec)
    assert (sweep.name, sweep.question, sweep.seeds, sweep.metric) == ("grid", "Why?", (0, 1), "f1")
    assert [f"{point.name}, {seed}" for seed in sweep.seeds for point in sweep.points] == ORDER
    config = make_config({**sweep.config, **sweep.points[3].changes}, 1)
    assert (config.learning_rate, config.prefix.init, config.prefix.prefix_length, config.seed) == (0.01, "zero", 3, 1)
    assert sweep.points[3].key(1) == "learning_rate=0.01-init=zero-seed-1"


def test_values_given_with_the_command_replace_those_of_the_file(spec):
    sweep = read_sweep(spec, {"seeds": [7], "config.max_steps": 9, "config.prefix.prefix_length": 5, "grid.prefix.init": ["zero"]})
    assert sweep.seeds == (7,) and [point.name for point in sweep.points] == [
        "learning_rate=0.1, init=zero",
        "learning_rate=0.01, init=zero",
    ]
    assert differences(sweep.base, read_sweep(spec).base) == ["max_steps", "prefix"]


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_the_specifications_that_ship_are_whole(file):
    sweep = read_sweep(file)
    assert sweep.question.endswith("?")
    if sweep.search:  # of one seed; finalists.toml runs its best with more
        assert len(sweep.points) >= 16 and not sweep.evaluation
        return
    only_starts = all("pretraining.objective" in point.changes for point in sweep.points)  # for other sweeps, which have the seeds
    assert only_starts or len(sweep.seeds) >= 3
    configs = [make_config({**sweep.config, **point.changes}, 0) for point in sweep.points]
    assert len({json.dumps(config.to_dict()) for config in configs}) == len(configs) >= 4  # no point twice
    assert "squadshifts" not in (sweep.evaluation or "")  # published as test data: never scored on what it trains on


def test_the_depth_sweep_has_the_first_the_last_and_each_layer_alone():
    chosen = {
        point.changes.get("prefix.layers") and tuple(point.changes["prefix.layers"])
        for point in read_sweep(SPECS[0].with_name("depth.toml")).points
    }
    L = 6
    assert chosen == {None} | {tuple(range(k)) for k in range(1, L)} | {tuple(range(k, L)) for k in range(1, L)} | {(k,) for k in range(L)}


BAD = {
    "no TOML": ("seeds = ", "could not be read as TOML"),
    "an unknown field": ("sedes = [1]\n[grid]\nepochs = [1.0]", "sedes is no field of a sweep"),
    "an unknown config field": ("[config]\nepoch = 1.0\n[grid]\nepochs = [1.0]", "epoch is no field of a training config"),
    "a seed among the points": ("[grid]\nseed = [1, 2]", "seed is no field of a training config .* list of its own"),
    "a value out of range": ("[grid]\nprefix.prefix_length = [4, 0]", "prefix_length is 0; it must be at least 1"),
    "a value of the wrong type": ('[grid]\nepochs = ["many"]', "not supported between"),
    "no points": ("seeds = [0]", "give one of .* not none"),
    "points in two ways": ("[grid]\nepochs = [1.0]\n[[points]]\nname = 'a'", "not grid and points"),
    "a point's name twice": ("[[points]]\nname = 'a'\n[[points]]\nname = 'a'\nepochs = 1.0", "a name of its own"),
    "no seeds": ("seeds = []\n[grid]\nepochs = [1.0]", "list of different whole numbers"),
    "an unknown metric": ("metric = 'loss'\n[grid]\nepochs = [1.0]", 'metric is "loss"'),
    "a search without an end": ("[search]\nepochs = {low = 1.0, high = 2.0}", "one seed and a number of trials"),
    "trials of a grid": ("trials = 3\n[grid]\nepochs = [1.0]", "trials is for a search alone"),
    "a search out of range": ("trials = 3\n[search]\nepochs = {low = 0.0, high = 2.0}", "epochs is 0.0"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_a_bad_specification_has_its_sentence(text, said, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"(?s)bad\.toml.*{said}"):
        read_sweep(file)


def test_a_worker_stops_at_its_limit_and_the_next_goes_on_in_order(spec, trained):
    assert worker(spec).work(limit=3) == {}
    assert finished(spec) == ORDER[:3]
    assert worker(spec).work() == {}
    assert finished(spec) == ORDER and len(trained) == 8
    assert worker(spec).work() == {} and len(trained) == 8  # nothing is left to do
    rates = [trial["held_out"]["f1"] for trial in worker(spec).record("")["trials"]]
    assert rates == pytest.approx([10, 10, 1, 1] * 2)
    assert [trial.value for trial in worker(spec).study.trials] == rates  # what Optuna is told


def test_points_and_seeds_can_be_added_later_but_the_config_cannot_change(spec, trained):
    worker(spec, {"seeds": [0], "grid.prefix.init": ["normal"]}).work()
    assert finished(spec) == ["learning_rate=0.1, init=normal, 0", "learning_rate=0.01, init=normal, 0"]
    worker(spec).work()
    assert sorted(finished(spec)) == sorted(ORDER) and len(trained) == 8
    with pytest.raises(InputError, match=r"holds the sweep grid with max_steps = 4, not 5; give another folder, storage or name"):
        worker(spec, {"config.max_steps": 5})


def test_a_failed_run_leaves_the_others_going_and_is_tried_again_by_the_next_call(spec, trained, monkeypatch):
    whole = workers.train

    def fail(config, run, command):
        if config.prefix.init == "zero" and config.seed == 0:
            raise RuntimeError("out of memory")
        return whole(config, run, command)

    monkeypatch.setattr(workers, "train", fail)
    failed = worker(spec).work()
    assert failed == dict.fromkeys(
        ("learning_rate=0.1-init=zero-seed-0", "learning_rate=0.01-init=zero-seed-0"), "RuntimeError: out of memory"
    )
    assert finished(spec) == [name for name in ORDER if not name.endswith("zero, 0")]
    monkeypatch.setattr(workers, "train", whole)
    assert worker(spec).work() == {}
    assert sorted(finished(spec)) == sorted(ORDER) and len(trained) == 8


def test_a_finished_sweep_gives_its_record_and_a_failed_run_is_no_result(spec, trained, tmp_path, monkeypatch):
    record = finish(read_sweep(spec), tmp_path / "runs")
    assert [f"{trial['point']}, {trial['seed']}" for trial in record["trials"]] == ORDER

    def fail(config, run, command):
        raise MemoryError("no room")

    monkeypatch.setattr(workers, "train", fail)
    with pytest.raises(RuntimeError, match=r"8 runs of grid failed: .*MemoryError: no room"):
        finish(read_sweep(spec), tmp_path / "others")


def test_bad_data_ends_the_work_at_once(spec, trained, monkeypatch):
    def refuse(config, run, command):
        raise InputError("no.json does not exist.")

    monkeypatch.setattr(workers, "train", refuse)
    with pytest.raises(InputError, match=r"no\.json does not exist"):
        worker(spec).work()
    assert [trial.state for trial in worker(spec).study.trials if trial.state.is_finished()] == [TrialState.FAIL]


def test_a_run_queued_twice_is_run_once(spec, trained):
    first, second = worker(spec), worker(spec)
    first._queue(retry=True)
    before = first._trials(*TrialState)
    with pytest.MonkeyPatch.context() as patch:  # the second looked before the first had written
        patch.setattr(second, "_trials", lambda *states: [])
        second._queue(retry=True)
    assert len(first._trials(*TrialState)) == 2 * len(before) == 16
    assert first.work(limit=5) == second.work() == {}
    assert finished(spec) == ORDER and len(trained) == 8


def test_a_dead_workers_run_is_taken_up_by_one_other_and_a_living_ones_is_not(spec, trained):
    dead, living = worker(spec), worker(spec)
    dead._queue(retry=True)
    for one, alive in ((dead, time.time() - 100), (living, time.time())):
        one.study.ask().set_user_attr("alive", alive)
    worker(spec, patience=50).work(limit=6)
    assert finished(spec) == ORDER[2:]
    worker(spec, patience=50).work(limit=1)
    assert finished(spec) == [*ORDER[2:], ORDER[0]]  # the dead one's; the living one's is left alone
    assert len(living._trials(TrialState.RUNNING)) == 1


def test_a_worker_that_was_given_up_while_suspended_leaves_its_run_to_the_other(spec, trained, monkeypatch):
    whole, first = workers.train, []

    def slow(config, run, command):
        if not first:  # meanwhile another worker has given this one up
            first.append(run.name)
            (mine,) = worker(spec)._trials(TrialState.RUNNING)
            worker(spec).study.tell(mine.number, state=TrialState.FAIL)
            for _ in range(400):
                time.sleep(0.05)
        return whole(config, run, command)

    monkeypatch.setattr(workers, "train", slow)
    monkeypatch.setattr(workers, "_SIGN_OF_LIFE", 0.05)
    started = time.monotonic()
    assert worker(spec).work(limit=8) == {}
    assert time.monotonic() - started < 15
    assert first == ["learning_rate=0.1-init=normal-seed-0"] and finished(spec) == ORDER[1:]
    worker(spec).work()
    assert sorted(finished(spec)) == sorted(ORDER)


def test_a_run_that_kills_its_worker_again_and_again_is_left_alone_within_a_call(spec, trained):
    for _ in range(3):
        one = worker(spec, {"seeds": [0], "grid.prefix.init": ["zero"], "grid.learning_rate": [0.1]}, patience=0.0)
        one._give_up_dead()
        one._queue(retry=True)
        one.study.ask()
    one._give_up_dead()
    one._queue(retry=False)
    assert [trial.state for trial in one.study.trials] == [TrialState.FAIL] * 3


def test_an_interrupted_run_goes_on_with_the_next_call(spec, trained, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "train", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        worker(spec).work()
    assert worker(spec).work() == {} and sorted(finished(spec)) == sorted(ORDER)


def test_a_search_draws_within_its_space_and_the_same_again(search_spec, trained):
    worker(search_spec).work(limit=2)
    worker(search_spec).work()
    drawn = [(config.learning_rate, config.batch_size, config.prefix.init) for config in trained]
    assert len(set(drawn)) == 4
    assert all(1e-3 <= rate <= 1e-1 and size in range(2, 17, 2) and init in ("normal", "zero") for rate, size, init in drawn)
    (search_spec.parent / "journal.log").unlink()
    worker(search_spec).work()
    assert [(config.learning_rate, config.batch_size, config.prefix.init) for config in trained[4:]] == drawn
    assert worker(search_spec).record("")["trials"][0]["changes"]["learning_rate"] == drawn[0][0]


def test_a_search_goes_on_with_what_a_dead_worker_drew(search_spec, trained):
    one = worker(search_spec, {"trials": 1})
    one._queue(retry=True)
    drawn = workers._suggest(one.study.ask(), one.sweep.search)
    worker(search_spec, {"trials": 1}, patience=0.0).work()
    (config,) = trained
    assert {"learning_rate": config.learning_rate, "batch_size": config.batch_size, "prefix.init": config.prefix.init} == drawn


def test_a_database_serves_as_storage_and_one_that_is_not_there_has_its_sentence(spec, trained):
    url = f"sqlite:///{spec.parent / 'sweep.db'}"
    Worker(read_sweep(spec), spec.parent / "runs", url).work(limit=5)
    Worker(read_sweep(spec), spec.parent / "runs", url).work()
    assert len(trained) == 8 and len(optuna.load_study(study_name="grid", storage=url).trials) == 8
    with pytest.raises(InputError, match=r"storage could not be opened \(\w+\); give a file, or a URL") as refusal:
        Worker(read_sweep(spec), spec.parent / "runs", "nodatabase://user:secret@host/sweep")
    assert "secret" not in str(refusal.value)


def start(spec: Path, *words: str) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "ptv2", "sweep", str(spec), "--runs", str(spec.parent / "runs"), *words]
    return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_and_two_more_finish_a_sweep_with_each_run_made_once(spec):
    """For real: one is killed within its first run, two start over at once, and one of them goes on with that run."""
    export = spec.parent / "record.json"
    long = ["--set", "config.max_steps=60", "--set", "config.evaluations=20", "--set", "grid.learning_rate=[0.1]", "--export", str(export)]
    process = start(spec, *long)
    runs = spec.parent / "runs"
    while not any(runs.glob("*/checkpoints/*/complete")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (cut,) = (run.parent for run in runs.glob(f"*/{RUN_FILE}"))
    begun = records.read_json(cut / RUN_FILE)
    assert begun["status"] == "running"
    changes = {"config.max_steps": 60, "config.evaluations": 20, "grid.learning_rate": [0.1]}
    others = [start(spec, *long) for _ in range(2)]
    # The others wait two minutes for a sign of life; here it is known at once that there will be none.
    time.sleep(1)
    here = Worker(read_sweep(spec, changes), runs, str(runs / "journal.log"), 120)
    (lost,) = [trial for trial in here._trials(TrialState.RUNNING) if trial.user_attrs["key"] == cut.name]
    here.study.tell(lost.number, state=TrialState.FAIL)
    for other in others:
        out, err = other.communicate()
        assert other.returncode == 0, err
        assert json.loads(out) == {"sweep": "grid", "runs": 4, "finished": 4, "failed": {}}
    done = [trial.user_attrs["key"] for trial in here._trials(TrialState.COMPLETE)]
    assert sorted(done) == sorted(point.key(seed) for point in here.sweep.points for seed in (0, 1))
    assert records.read_json(cut / RUN_FILE)["date"] == begun["date"]  # it went on, rather than anew
    record = read_sweep_record(export)
    assert {(trial["point"], trial["seed"]) for trial in record["trials"]} == {(p.name, s) for p in here.sweep.points for s in (0, 1)}


def test_a_record_says_what_train_and_evaluate_found(spec, tmp_path, capsys):
    words = ["sweep", str(spec), "--runs", str(tmp_path / "runs"), "--limit", "1", "--export", str(tmp_path / "record.json")]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"sweep": "grid", "runs": 8, "finished": 1, "failed": {}}
    record = read_sweep_record(tmp_path / "record.json")
    assert shlex.split(record["command"])[1:3] == ["sweep", str(spec)] and record["config"]["max_steps"] == 4
    (trial,) = record["trials"]
    run = tmp_path / "runs" / "learning_rate=0.1-init=normal-seed-0"
    trained, evaluation = records.read_json(run / RUN_FILE), records.read_json(run / "evaluation.json")
    assert trial["held_out"] == {name: trained["metrics"][f"held_out_{name}"] for name in ("exact_match", "f1")}
    assert trial["evaluation"]["f1"] == evaluation["f1"] and trial["evaluation"]["data_sha256"] == evaluation["data_sha256"]
    losses = [entry["train_loss"] for entry in trained["log_history"] if "train_loss" in entry]
    assert [trial["train_loss"]] == losses and 3 < losses[0] < 7
    assert trial["windows_seen"] == 4 * 8 and [windows for windows, _ in trial["curve"]] == [16, 32]
    assert trial["parameters"]["trained"] == 3 * 2 * 2 * 32 + 66 and trial["train_questions"] == trained["data"]["train"]["questions"]
    assert record["provenances"][trial["provenance"]]["held_out"] == trained["data"]["held_out"]
    for said in (trial["command"], evaluation["command"]):  # each repeats what it stands beside
        words = shlex.split(said)[1:]
        words = [*words[:-1], str(tmp_path / "again")] if words[0] == "train" else words
        assert cli.main(words) == 0
    again = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{\n", ""]))
    assert again["f1"] == evaluation["f1"]
    assert records.read_json(tmp_path / "again" / RUN_FILE)["metrics"] == trained["metrics"]


def exported(spec: Path, storage: str, changes: dict | None = None) -> dict:
    one = Worker(read_sweep(spec, changes), spec.parent / "runs", str(spec.parent / storage))
    one.work()
    return one.record("")


def test_records_of_two_machines_merge_into_one_without_doubles(spec, trained):
    few = exported(spec, "a.log", {"seeds": [0]})
    more = exported(spec, "b.log")
    merged = merge_records([few, more])
    assert [f"{trial['point']}, {trial['seed']}" for trial in merged["trials"]] == ORDER
    assert merged["provenances"] == few["provenances"] and len(merged["provenances"]) == 1
    assert merge_records([merged, few]) == merged


def test_records_that_do_not_belong_together_are_refused(spec, trained):
    one = exported(spec, "a.log")
    other = exported(spec, "b.log", {"config.max_steps": 5})
    with pytest.raises(InputError, match="differ in max_steps; only parts of one sweep can be merged"):
        merge_records([one, other])
    moved = json.loads(json.dumps(one))
    moved["trials"] = [{**trial, "seed": trial["seed"] + 2} for trial in moved["trials"]]
    moved["config"]["train_data"] = ["elsewhere.json"]  # the same data in another place
    assert len(merge_records([one, moved])["trials"]) == 16
    moved["provenances"][0]["held_out"]["sha256"] = "another"
    with pytest.raises(InputError, match="not all scored on the same questions"):
        merge_records([one, moved])


def test_pretraining_objectives_may_hold_out_different_questions_where_an_evaluation_compares_them(spec, trained):
    one = exported(spec, "a.log", {"seeds": [0], "grid.prefix.init": ["normal"], "grid.learning_rate": [0.1]})
    one["trials"][0]["evaluation"] = {"data_sha256": "the evaluation"}
    other = json.loads(json.dumps(one))
    for record, objective in ((one, "mixed"), (other, "cloze")):
        record["trials"][0] |= {"point": objective, "changes": {"pretraining.objective": objective}}
    other["provenances"][0]["held_out"]["sha256"] = "another"
    assert [trial["point"] for trial in merge_records([one, other])["trials"]] == ["mixed", "cloze"]
    for field, value in (("evaluation", None), ("changes", {})):  # nothing compares them; no pretraining made the questions
        parts = json.loads(json.dumps([one, other]))
        for record in parts:
            record["trials"][0][field] = value
        with pytest.raises(InputError, match="not all scored on the same questions"):
            merge_records(parts)
