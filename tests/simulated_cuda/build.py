"""Compiles the simulated device, once for each version of its sources and of torch. Needs g++."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock  # torch brings it

NAME = "simulated_cuda_device"
HERE = Path(__file__).parent
LIBRARIES = ("torch", "torch_cpu", "torch_python", "c10")


def build() -> Any:
    """The compiled module."""
    library = _cache() / f"{NAME}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):  # several processes may begin at once
        if not library.exists():
            _compile(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cache() -> Path:
    key = hashlib.sha256(torch.__version__.encode())
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "build.py"]):
        key.update(source.read_bytes())
    return HERE.parents[1] / "build" / f"{NAME}-{key.hexdigest()[:16]}"


def _compile(library: Path) -> None:
    home = Path(torch.__file__).parent
    includes = (
        home / "include",
        home / "include/torch/csrc/api/include",
        Path(sysconfig.get_paths()["include"]),
    )
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={NAME}"]
    flags += [f"-I{folder}" for folder in includes]

    def compiled(source: Path) -> str:
        made = str(library.parent / f"{source.stem}.o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(HERE.glob("*.cpp"))))
    partial = library.with_suffix(f".{os.getpid()}")
    links = [f"-L{home / 'lib'}", *(f"-l{name}" for name in LIBRARIES), f"-Wl,-rpath,{home / 'lib'}"]
    subprocess.run(["g++", "-shared", *objects, "-o", str(partial), *links], check=True)
    partial.rename(library)
