"""The package's own machine code: C++ beside this file, compiled once for the processor it runs on.

A source is plain C++ with a C interface on pointers, called through ctypes (which lets other threads run meanwhile). OpenMP is the
one that torch has loaded, so both share its threads and `torch.set_num_threads`.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library made of ptv2/NAME.cpp; None where there is no compiler that can make it.

    It is kept in the user's cache folder, under a name that hashes its source, the compiler and the processor.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        version = subprocess.run((compiler, "--version"), capture_output=True, check=True).stdout
        processor = repr(sorted(torch.cpu.get_capabilities().items())).encode()
        digest = hashlib.sha256(b"\n".join((source.read_bytes(), version, processor, " ".join(_FLAGS).encode()))).hexdigest()[:16]
        file = _cache_folder() / f"{name}-{digest}.so"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # processes may do this at once: the last one wins
                made = Path(folder) / file.name
                subprocess.run((compiler, *_FLAGS, str(source), "-o", str(made)), capture_output=True, check=True)
                made.replace(file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError):
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptv2"


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
