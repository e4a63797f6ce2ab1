"""Contenders in turn: each in a process of its own, asked round by round, so that what disturbs the machine disturbs all."""

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

Answers = dict[str, Callable]


class Process:
    """A process that prepares itself once and then answers questions, one at a time.

    Args:
        prepare: called in the new process with `arguments`; returns what it can be asked, name -> function.
    """

    def __init__(self, prepare: Callable[..., Answers], *arguments):
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's memory and threads
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, prepare, arguments), daemon=True)
        self._process.start()
        child.close()

    def wait(self) -> None:
        """Until it is prepared."""
        self._receive()

    def ask(self, name: str, *arguments):
        self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self):
        try:
            error, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("A benchmark's process ended before it answered; there may be too little memory.") from None
        if error is not None:
            raise RuntimeError(f"A benchmark's process failed:\n{error}")
        return answer

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def start(names: list[str], prepare: Callable[..., Answers], *arguments) -> dict[str, Process]:
    """A process for each name, prepared with it and `arguments`; they get ready side by side."""
    processes = {name: Process(prepare, name, *arguments) for name in names}
    for process in tqdm(processes.values(), desc="prepare"):
        process.wait()
    return processes


def _serve(pipe: Connection, prepare: Callable[..., Answers], arguments: tuple) -> None:
    """The other end of a `Process`."""
    try:
        answers = prepare(*arguments)
        pipe.send((None, None))
        while True:
            name, given = pipe.recv()
            pipe.send((None, answers[name](*given)))
            _give_back_memory()
    except EOFError:  # the parent has closed its end
        return
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def _give_back_memory() -> None:
    """What was freed goes back to the system, for the next one's turn: all together would need too much for a small machine."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with all that it started on a GPU."""
    _synchronise()
    started = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def use_threads(count: int) -> None:
    """Let torch use this many threads; 0 leaves it its own choice, one for each core."""
    if count:
        torch.set_num_threads(count)


def resident_mib() -> float:
    """Memory that this process holds now, in MiB; 0 where a GPU's own memory is what is measured."""
    if torch.cuda.is_available():
        return 0.0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # not Linux
        return 0.0


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of what the rounds gave."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
