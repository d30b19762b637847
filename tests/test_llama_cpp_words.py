"""A placement in llama.cpp's words."""

from __future__ import annotations

import re

import pytest

from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.views.llama_cpp import llama_cpp_options
from tests.layouts import four_gpus, laptop, llama, workstation


def placed(machine, homes: dict[str, str]) -> Plan:
    layout = llama(layers=4)
    return make_plan(layout, machine, Workload(2048), placement=homes, policy="hand")


GPU0, GPU1 = "cuda:0", "cuda:1"


@pytest.mark.parametrize(
    ("machine", "homes", "options"),
    [
        (laptop(), {"": "cpu"}, "-ngl 0 -c 2048"),
        (laptop(), {"": "cpu", "layers.2": "disk"}, "-ngl 0 -c 2048"),
        (workstation(), {"": GPU0}, "-ngl 99 -c 2048"),
        # Layers 2 and 3 and the head on the GPU: three of the last.
        (workstation(), {"": GPU0, "layers.0": "cpu", "layers.1": "disk"}, "-ngl 3 -c 2048"),
        # The head in RAM: the two layers alone.
        (workstation(), {"": GPU0, "layers.0": "cpu", "layers.1": "cpu", "head": "cpu"}, "-ngl 2 -c 2048"),
        (
            workstation(),
            {"": GPU0, "layers.1": "cpu", "layers.3": "disk"},
            r'-ngl 99 -ot "blk\.(1|3)\.=CPU" -c 2048',
        ),
        (
            four_gpus(),
            {"": GPU0, "layers.3": GPU1, "head": GPU1},
            "-ngl 99 --tensor-split 3,1,0,0 -c 2048",
        ),
        (
            four_gpus(),
            {"": GPU0, "layers.1": GPU1, "layers.3": "cpu"},
            r'-ngl 99 --tensor-split 2,1,0,0 -ot "blk\.(0|2)\.=CUDA0,blk\.(1)\.=CUDA1,blk\.(3)\.=CPU" -c 2048',
        ),
    ],
)
def test_options_of_a_placement(machine, homes, options) -> None:
    assert llama_cpp_options(placed(machine, homes)) == options


def test_overrides_are_regular_expressions_of_tensor_names() -> None:
    options = llama_cpp_options(placed(workstation(), {"": GPU0, "layers.1": "cpu", "layers.3": "cpu"}))
    (pattern,) = re.findall(r'-ot "(.*)=CPU"', options)
    assert re.search(pattern, "blk.1.attn_q.weight")
    assert not re.search(pattern, "blk.11.attn_q.weight")
    assert not re.search(pattern, "blk.2.attn_q.weight")
