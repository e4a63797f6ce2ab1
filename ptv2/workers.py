"""Running a sweep: any number of processes and machines work on it at once, on Optuna with a shared storage.

The storage, a journal file or a database, holds who runs what. Each run lies in a directory of its own, where training can be
killed at any moment and go on. A worker leaves a sign of life in the storage; what a dead one has left is queued again.
Optuna's own heartbeats do that for databases alone.
"""

import _thread
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ptv2 import records
from ptv2.answers import QuestionAnswerer
from ptv2.cli import command_line
from ptv2.errors import InputError
from ptv2.evaluation import evaluation_record
from ptv2.squad import load_examples
from ptv2.sweeps import Sweep, describe, differences, make_config, merge_records, read_sweep_record, sweep_record, trial_result
from ptv2.training import show_progress, train

_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
_ATTEMPTS = 3  # that may end without a word (killed, out of memory) within one call before a run is left alone
_SIGN_OF_LIFE = 15.0  # seconds between two


@dataclass
class Worker:
    """One process at work on a sweep.

    Args:
        sweep: what to run.
        folder: of the runs, one directory each. Workers on one file system share it; elsewhere a run taken over starts anew.
        storage: a database's URL as Optuna takes it, or a journal file; the same for all workers.
        patience: seconds without a sign of life after which another worker counts as dead; the machines' clocks must agree to
            well within that.

    Raises:
        InputError: the storage can't be opened, or holds a sweep of this name with another config.
    """

    sweep: Sweep
    folder: Path
    storage: str
    patience: float = 8 * _SIGN_OF_LIFE

    def __post_init__(self):
        self.study = _open_study(self.sweep, self.storage)

    def work(self, limit: int | None = None, after_each=lambda: None) -> dict[str, str]:
        """Run until all runs are finished, here or by others.

        Args:
            limit: take up at most this many; None for no limit.
            after_each: is called after each finished run.

        Returns:
            of the runs that failed here, the reason by the run's name.
        """
        failed: dict[str, str] = {}
        taken, retry = 0, True
        while limit is None or taken < limit:
            self._give_up_dead()
            self._queue(retry)
            retry = False  # what failed is tried again by a new call only
            if not self._trials(TrialState.WAITING):
                if not self._trials(TrialState.RUNNING):
                    break
                time.sleep(min(self.patience, _SIGN_OF_LIFE) / 2)  # the others may yet die
                continue
            trial = self.study.ask()
            if self._is_superfluous(trial):
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            taken += 1
            error = self._run(trial)
            if error:
                failed[trial.user_attrs["key"]] = error
            else:
                after_each()
        return failed

    def record(self, command: str) -> dict:
        """The sweep's record of what is finished so far."""
        finished = [trial.user_attrs["finished"] for trial in self._trials(TrialState.COMPLETE)]
        return sweep_record(self.sweep, finished, command)

    def export(self, file: Path, command: str, others: tuple[Path, ...] = ()) -> dict:
        """Write the record, merged with what stands in the file and in others, and return it."""
        parts = [read_sweep_record(path) for path in (*([file] if file.is_file() else []), *others)]
        merged = merge_records([self.record(command), *parts])
        records.write_json(file, merged)
        return merged

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _queue(self, retry: bool) -> None:
        """Enqueue what is neither waiting, running nor finished. Two workers may do so at once: see `_is_superfluous`."""
        by_key: dict[str, list[optuna.trial.FrozenTrial]] = {}
        for trial in self._trials(*TrialState):
            by_key.setdefault(trial.user_attrs.get("key", ""), []).append(trial)
        for seed in self.sweep.seeds:
            for point in self.sweep.points:
                key = point.key(seed)
                before = by_key.get(key, [])
                ended = any("error" in trial.user_attrs for trial in before) or len(before) >= _ATTEMPTS
                if any(trial.state in _LIVE for trial in before) or (ended and not retry):
                    continue
                params = before[-1].params if before else {}  # a search keeps what it drew
                told = {"key": key, "point": point.name, "changes": point.changes, "seed": seed}
                self.study.enqueue_trial(params, told)

    def _is_superfluous(self, trial: optuna.Trial) -> bool:
        """Whether the run was queued twice, or another worker took the last one and Optuna made this trial up."""
        key = trial.user_attrs.get("key")
        return key is None or any(t.user_attrs.get("key") == key and t.number < trial.number for t in self._trials(*_LIVE))

    def _give_up_dead(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            last = trial.user_attrs.get("alive") or trial.datetime_start.timestamp()
            if time.time() - last > self.patience:
                with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # another worker was faster
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _run(self, trial: optuna.Trial) -> str | None:
        """Train and score one run, or go on with it; the reason if it failed."""
        told = trial.user_attrs
        self.study.sampler = optuna.samplers.TPESampler(seed=trial.number)  # fixed, yet another one in each worker
        changes = {**told["changes"], **_suggest(trial, self.sweep.search)}
        point = describe(changes) if self.sweep.search else told["point"]
        done, total = len(self._trials(TrialState.COMPLETE)), len(self.sweep.points) * len(self.sweep.seeds)
        print(f"{self.sweep.name}: {point}, seed {told['seed']} ({done} of {total} done)", file=sys.stderr)
        lost = threading.Event()
        try:
            with _sign_of_life(trial, lost):
                result = self._train_and_score(told["key"], changes, told["seed"])
        except KeyboardInterrupt:
            if lost.is_set():
                print(f"{self.sweep.name}: {told['key']} was taken over by another worker", file=sys.stderr)
                return None
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        except Exception as error:  # out of memory, a full disk: the other runs may still do
            reason = f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", reason)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            if isinstance(error, InputError):  # the data or the specification: no run would do
                raise
            print(f"{self.sweep.name}: {told['key']} failed: {reason}", file=sys.stderr)
            return reason
        with contextlib.suppress(UpdateFinishedTrialError):  # taken over in the last moment
            trial.set_user_attr("finished", {"point": point, "changes": changes, "seed": told["seed"], **result})
            self.study.tell(trial, result["held_out"][self.sweep.metric], skip_if_finished=True)
        return None

    def _train_and_score(self, key: str, changes: dict, seed: int) -> dict:
        config, run = make_config({**self.sweep.config, **changes}, seed), self.folder / key
        record = train(config, run, command_line(config, run))
        return trial_result(record, _evaluation(run, self.sweep.evaluation) if self.sweep.evaluation else None)


def finish(sweep: Sweep, folder: str | Path, storage: str = "") -> dict:
    """Work on a sweep until all of it is finished, and return its record; log lines go to stderr, as the commands' do.

    Args:
        folder: of the runs.
        storage: what the workers share; "" for a journal file in the folder.

    Raises:
        RuntimeError: runs failed.
    """
    folder = Path(folder)
    worker = Worker(sweep, folder, storage or str(folder / "journal.log"))
    with contextlib.redirect_stdout(sys.stderr):
        failed = worker.work()
    if failed:
        raise RuntimeError(f"{len(failed)} runs of {sweep.name} failed: {failed}")
    return worker.record("")


def _evaluation(run: Path, data: str) -> dict:
    """The run's score on `data`, as `ptv2 evaluate` writes it; one that is there is taken."""
    file = run / "evaluation.json"
    if not file.is_file():
        answerer, examples = QuestionAnswerer.from_pretrained(run, "fp32"), load_examples(data, "dev")
        predictions = answerer.predict_examples(examples, progress=show_progress)
        command = f"ptv2 evaluate {run} --data {data}"
        records.write_json(file, evaluation_record(run, answerer, data, examples, predictions, command))
    return records.read_json(file)


def _open_study(sweep: Sweep, storage: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(storage))
        study = optuna.create_study(study_name=sweep.name, storage=storage, direction="maximize", load_if_exists=True)
    except Exception as error:  # SQLAlchemy and each driver raise their own kinds; the URL may hold a password
        kind = type(error).__name__
        raise InputError(f"The sweep's storage could not be opened ({kind}); give a file, or a URL that Optuna takes.") from error
    before = study.user_attrs.setdefault("base", sweep.base)
    different = differences(sweep.base, before)
    if different:
        name = different[0]
        raise InputError(
            f"The storage holds the sweep {sweep.name} with {name} = {before.get(name)}, not {sweep.base[name]}; "
            "give another folder, storage or name."
        )
    study.set_user_attr("base", sweep.base)
    return study


@contextlib.contextmanager
def _sign_of_life(trial: optuna.Trial, lost: threading.Event) -> Iterator[None]:
    """Tell the others now and then that this trial's worker lives.

    If they have given it up all the same (this process was suspended, say), two would work in one directory: then `lost` is
    set, and the main thread interrupted.
    """
    stop = threading.Event()

    def tell() -> None:
        while not stop.is_set():
            try:
                trial.set_user_attr("alive", time.time())
            except UpdateFinishedTrialError:
                lost.set()
                _thread.interrupt_main()
                return
            except StorageInternalError:  # away for a moment
                pass
            stop.wait(_SIGN_OF_LIFE)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _suggest(trial: optuna.Trial, search: dict[str, dict]) -> dict:
    """A point of the search space: {choices}, or {low, high} with log or step; whole numbers where both ends are."""
    chosen = {}
    for name, space in search.items():
        if "choices" in space:
            chosen[name] = trial.suggest_categorical(name, space["choices"])
        else:
            whole = isinstance(space["low"], int) and isinstance(space["high"], int)
            chosen[name] = (trial.suggest_int if whole else trial.suggest_float)(name, **space)
    return chosen
