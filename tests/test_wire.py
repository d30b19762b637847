"""The schema between Python and the front ends: closed, capped, and the same in TypeScript."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic import plan, wire
from llm_magic.errors import OptionError
from llm_magic.wire import Apply, Hello, Placement, Propose, Stop, decode_command
from tests import view_states

LABEXTENSION = Path(__file__).parents[1] / "labextension"
VIEW = "0123456789abcdef"


def test_the_typescript_types_are_those_of_the_schema() -> None:
    generated = runpy.run_path(str(LABEXTENSION / "generate_types.py"))["typescript"]()
    assert (LABEXTENSION / "src" / "wire.ts").read_text() == generated, (
        "python labextension/generate_types.py writes it anew"
    )


def test_every_way_of_a_placement_has_a_word_on_the_wire() -> None:
    assert get_args(wire.Way) == get_args(plan.Way)


def test_the_states_that_the_views_are_tested_with_are_those_of_today() -> None:
    assert view_states.TARGET.read_text() == view_states.text(), "python -m tests.view_states writes it anew"


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ({"type": "hello"}, Hello()),
        ({"type": "hello", "view": VIEW}, Hello(VIEW)),
        ({"type": "stop", "view": VIEW}, Stop(VIEW)),
        (
            {
                "type": "propose",
                "view": VIEW,
                "seq": 3,
                "placement": {"homes": {"layers.1": "disk"}, "limits": {"cpu": 5}},
            },
            Propose(VIEW, 3, Placement({"layers.1": "disk"}, "", {"cpu": 5})),
        ),
        (
            {"type": "apply", "view": VIEW, "seq": 4, "placement": {"policy": "auto"}},
            Apply(VIEW, 4, Placement(policy="auto")),
        ),
    ],
)
def test_what_our_views_send_is_understood(content, command) -> None:
    assert decode_command(content) == command


PLACEMENT = {"type": "propose", "view": VIEW, "seq": 1}


@pytest.mark.parametrize(
    "content",
    [
        None,
        5,
        "hello",
        [],
        {},
        {"type": "eval", "code": "1"},
        {"type": "state", "view": VIEW},
        {"type": "hello", "view": "../../etc"},
        {"type": "hello", "view": "a" * 65},
        {"type": "hello", "view": VIEW, "path": "/etc/passwd"},
        {"type": "stop"},
        {"type": "stop", "view": 7},
        PLACEMENT,
        PLACEMENT | {"placement": {"code": "x"}},
        PLACEMENT | {"placement": {}, "seq": -1},
        PLACEMENT | {"placement": {}, "seq": 1.5},
        PLACEMENT | {"placement": {"homes": {"": "disk"}}},
        PLACEMENT | {"placement": {"homes": {"x" * 201: "disk"}}},
        PLACEMENT | {"placement": {"homes": {"layers.1": "d" * 41}}},
        PLACEMENT | {"placement": {"homes": {"layers.1": None}}},
        PLACEMENT | {"placement": {"homes": {f"layers.{i}": "cpu" for i in range(wire.BLOCKS_AT_MOST + 1)}}},
        PLACEMENT | {"placement": {"policy": "p" * 41}},
        PLACEMENT | {"placement": {"limits": {"cpu": -1}}},
        PLACEMENT | {"placement": {"limits": {"cpu": 1 << 60}}},
        PLACEMENT | {"placement": {"limits": {"cpu": float("nan")}}},
        PLACEMENT | {"placement": {"limits": {f"cuda:{i}": 1 for i in range(65)}}},
        PLACEMENT | {"placement": {"homes": {"a": "b" * (1 << 21)}}},
        {"type": object()},
    ],
)
def test_what_they_never_send_is_refused(content) -> None:
    with pytest.raises(OptionError, match=r"no command|too large"):
        decode_command(content)


def test_nesting_without_end_is_refused() -> None:
    nested: dict[str, object] = {"type": "hello"}
    nested["view"] = nested
    with pytest.raises(OptionError):
        decode_command(nested)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=20,
)
LIKELY = st.fixed_dictionaries(
    {"type": st.sampled_from(["hello", "stop", "propose", "apply", "state", "x"])},
    optional={
        "view": st.just(VIEW) | ANYTHING,
        "seq": st.integers() | ANYTHING,
        "placement": st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("homes", "policy", "limits", "__class__"), ANYTHING)
        )
        | ANYTHING,
    },
)


@given(ANYTHING | LIKELY)
def test_anything_else_is_a_command_or_refused(content) -> None:
    try:
        command = decode_command(content)
    except OptionError:
        return
    assert isinstance(command, Hello | Stop | Propose | Apply)
    json.dumps(wire.encode(command))
