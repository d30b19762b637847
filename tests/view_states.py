"""States for the tests of the views, made of real plans: ``python -m tests.view_states`` writes them.

A test fails while the file is older than what makes it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_magic.host.machine_file import read_machine
from llm_magic.machine import Machine
from llm_magic.model import ModelLayout
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import POLICIES, make_plan
from llm_magic.result import Footprint
from llm_magic.states import machine_state, map_state
from llm_magic.units import GIB, MIB
from llm_magic.wire import encode
from tests.layouts import moe30b, packed, qwen32b, starter

REPOSITORY = Path(__file__).parents[1]
TARGET = REPOSITORY / "labextension" / "tests" / "states.json"
NAMES = [planner.name for planner in POLICIES]
AUTO = next(planner for planner in POLICIES if planner.name == "auto")


def machine(name: str) -> Machine:
    return read_machine(REPOSITORY / "examples" / "machines" / f"{name}.json")


def plan_of(layout: ModelLayout, on: Machine, limits: dict[str, int] | None = None, **more: Any) -> Plan:
    workload = Workload(more.pop("context", 4096))
    return make_plan(
        layout, on, workload, placement=AUTO, policy="auto", max_memory=limits, source="owner/name", **more
    )


def states() -> dict[str, Any]:
    """Name -> state."""
    streamed = plan_of(qwen32b(), machine("rtx4090"), {"cpu": 40 * GIB}, context=8192)
    last = Footprint(generation_tps=3.31, tokens_per_sweep=2.6, limit_share=0.97)
    halved = plan_of(starter(), machine("laptop-no-gpu"), {"cpu": 190 * MIB})
    refused = plan_of(qwen32b(), machine("laptop-no-gpu"), {"cpu": 8 * GIB, "disk": 8 * GIB})
    mixed = plan_of(moe30b(), machine("two-3090"), {"cuda:0": 6 * GIB, "cuda:1": 5 * GIB})
    mixture = replace(packed(moe30b()), details={"routed_experts": True})
    split = plan_of(mixture, machine("rtx4090"), {"cuda:0": 8 * GIB}, context=8192)
    held = {"cpu": {"weights": 150 * MIB, "kv_cache": 3 * MIB}}
    return {
        "streamed": encode(map_state(streamed, model="qwen", status="loaded", last=last, policies=NAMES)),
        "halved": encode(map_state(halved, model="starter", status="loaded", memory=held, policies=NAMES)),
        "refused": encode(map_state(refused, policies=NAMES)),
        "experts": encode(map_state(mixed, policies=NAMES)),
        "split": encode(map_state(split, model="moe", status="loaded", policies=NAMES)),
        "machine": encode(machine_state(machine("rtx4090"), streamed, "qwen")),
        "laptop": encode(machine_state(machine("laptop-no-gpu"), halved, "starter")),
        "mac": encode(machine_state(machine("mac-unified"))),
        "cluster": encode(machine_state(machine("8xh100"))),
        "two": encode(machine_state(machine("two-3090"), mixed, "moe")),
    }


def text() -> str:
    """The file."""
    return json.dumps(states(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
