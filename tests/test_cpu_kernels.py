"""bitsandbytes' library for CPUs, beside one for GPUs that has none of its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_magic.backends.accelerate.placement.quantize import import_library
from llm_magic.model import ModelSpec
from llm_magic.planning.packed import kernel_of
from tests.engines import BACKEND

pytest.importorskip("bitsandbytes")

LIBRARY_FOR_GPUS = """
import ctypes
load = ctypes.cdll.LoadLibrary

class ForGpus:
    def __init__(self, path):
        self._library, self._name = load(path), path.replace("_cpu", "_cuda")

    def __getattr__(self, name):
        if name.startswith(("has_avx512", "gemv_4bit")):
            raise AttributeError(name)
        return getattr(self._library, name)

ctypes.cdll.LoadLibrary = ForGpus
"""
NOT_PACKAGED = """
import bitsandbytes.consts
bitsandbytes.consts.DYNAMIC_LIBRARY_SUFFIX = ".gone"
"""
COMPUTE = """
import torch
from llm_magic.backends.accelerate.placement import cpu_kernels
from tests.test_packing import arrange, forward, inputs, network_of
for method in ("nf4", "fp4", "int8"):
    network = network_of(method)
    arrange(network, "cpu")
    print(method, forward(network, inputs()).double().abs().sum().item())
print(cpu_kernels.are_loaded(), cpu_kernels.has_order())
"""
HERE = Path(__file__).parents[1]


def output(*parts: str) -> list[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", "".join(parts)]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What is computed where there is no GPU."""
    return output(COMPUTE)


def test_the_library_for_cpus_serves_beside_that_for_gpus(alone: list[str]) -> None:
    assert alone[-1].startswith("True")
    assert output(LIBRARY_FOR_GPUS, COMPUTE) == alone


def test_where_it_is_not_packaged_the_other_one_computes(alone: list[str]) -> None:
    import torch

    found = output(LIBRARY_FOR_GPUS, NOT_PACKAGED, COMPUTE)
    assert found[-1] == "False False"
    pairs = [(line.split(), other.split()) for line, other in zip(found[:-1], alone[:-1], strict=True)]
    for (method, sum_), (other_method, other) in pairs:
        assert method == other_method
        torch.testing.assert_close(float(sum_), float(other), rtol=0.01, atol=0)


@pytest.mark.parametrize("is_packaged", [True, False])
def test_plans_hear_of_it(is_packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import tiny

    bitsandbytes = import_library("bitsandbytes")
    for_gpus = SimpleNamespace(_lib=SimpleNamespace(_name="libbitsandbytes_cuda.so"))
    monkeypatch.setattr(bitsandbytes.backends.cpu.ops, "lib", for_gpus)
    if not is_packaged:
        monkeypatch.setattr(bitsandbytes.consts, "DYNAMIC_LIBRARY_SUFFIX", ".gone")
    spec = ModelSpec(str(tiny.save_llama(tmp_path / "model")), quantize="nf4")
    layout = BACKEND.layout(spec, lambda _event: None)
    assert kernel_of(layout) == ("nf4" if is_packaged else "nf4 by one thread")
