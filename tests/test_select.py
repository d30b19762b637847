"""Blocks that people name, and maps with some blocks elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.errors import PlanError
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited, select_blocks
from tests.layouts import llama, workstation


def labels(text: str, layers: int = 12) -> list[str]:
    return [block.label for block in select_blocks(llama(layers=layers), text)]


def numbered(*numbers: int) -> list[str]:
    return [f"layers.{i}" for i in numbers]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.3", numbered(3)),
        ("model.layers.3", numbered(3)),
        ("layers.3-5", numbered(3, 4, 5)),
        ("layers.3–5", numbered(3, 4, 5)),
        ("model.layers.3 - 5", numbered(3, 4, 5)),
        ("layers.5-3", numbered(3, 4, 5)),
        ("layers.3-3", numbered(3)),
        ("embed", ["embed"]),
        ("lm_head", ["head"]),
        (" head , layers.1,, embed", ["embed", "layers.1", "head"]),
        ("layers.1,layers.1-2", numbered(1, 2)),
        ("model.layers", numbered(*range(12))),
        ("model", ["embed", *numbered(*range(12)), "norm"]),
        (r"layers\..", numbered(*range(10))),
        (r"layers\..*[02468]", numbered(0, 2, 4, 6, 8, 10)),
        (r"model\.layers\.1\d", numbered(10, 11)),
        (r"layers\.\d{1,2},head", [*numbered(*range(12)), "head"]),
        (r"norm|head", ["norm", "head"]),
    ],
)
def test_ways_to_name_blocks(text: str, expected: list[str]):
    assert labels(text) == expected


def test_a_label_is_itself_and_no_pattern():
    assert labels("layers.1") == numbered(1)  # as a pattern its dot would match any letter
    assert labels("layers.1", layers=20) == numbered(1)


@pytest.mark.parametrize(
    ("text", "next_step"),
    [
        ("layers.12", "It has layers.0-11."),
        ("model.layers.10-12", "It has model.layers.0-11."),
        ("layer.3", "Did you mean layers.3?"),
        ("embedd", "Did you mean embed?"),
        ("xyzzy", "%llm map"),
        ("layers.3, xyzzy", "%llm map"),
        ("layers.(", "Did you mean"),
        ("(a+)+b", "%llm map"),
        ("x" * 10_000, "%llm map"),
        ("", "layers.20-31"),
        (" , ", "layers.20-31"),
    ],
)
def test_what_means_no_block_names_the_closest(text: str, next_step: str):
    with pytest.raises(PlanError) as caught:
        labels(text)
    assert next_step in caught.value.next_step
    assert len(str(caught.value)) < 500


@given(st.text(max_size=40) | st.from_regex(r"(layers|embed|head)[.\-,*0-9()\[\]]{0,12}", fullmatch=True))
def test_any_text_selects_blocks_or_says_why_not(text: str):
    layout = llama()
    try:
        found = select_blocks(layout, text)
    except PlanError:
        return
    assert found
    assert [block for block in layout.blocks if block in found] == list(found)


def plan(**changes) -> Plan:
    return make_plan(llama(**changes), workstation(), Workload(1024), placement={"": 0}, policy="map.json")


def test_an_edited_map_differs_in_what_was_asked_for():
    before = plan()
    after = edited(before, {"model.layers.1": "cpu", "model.layers.2": "disk"})
    assert after == before.device_map | {"model.layers.1": "cpu", "model.layers.2": "disk"}
    assert list(after) == list(before.device_map)
    assert set(before.device_map.values()) == {"cuda:0"}


def test_tied_blocks_move_together():
    after = edited(plan(tied=True), {"lm_head": "cpu"})
    assert after["model.embed_tokens"] == after["lm_head"] == "cpu"
    with pytest.raises(PlanError, match="embed and head share a tensor and cannot go to cpu and disk"):
        edited(plan(tied=True), {"model.embed_tokens": "cpu", "lm_head": "disk"})
