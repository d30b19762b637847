"""States on the wire: bytes by purpose, ways, what moves, commands to copy, and no word of this computer."""

from __future__ import annotations

import getpass
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic import wire
from llm_magic.host.machine_file import read_machine
from llm_magic.plan import Plan
from llm_magic.planning.select import edited
from llm_magic.result import Footprint
from llm_magic.states import machine_state, map_state, plan_state
from llm_magic.units import GIB, MIB
from llm_magic.views.commands import command_of
from tests import view_states
from tests.layouts import llama
from tests.view_states import machine, plan_of

NAMES = ["auto", "cpu"]


def by_hand(plan: Plan, **homes: str) -> Plan:
    """The same model with some blocks elsewhere; ``l3="disk"`` is ``layers.3``."""
    from llm_magic.planning.planner import make_plan

    names = {"embed": "model.embed_tokens"}
    changes = {names.get(name, f"model.layers.{name[1:]}"): home for name, home in homes.items()}
    return make_plan(
        plan.layout,
        plan.machine,
        plan.workload,
        placement=edited(plan, changes),
        policy="hand",
        source=plan.source,
    )


@pytest.fixture
def plan() -> Plan:
    # 4 layers of 50 Mi elements (100 MiB), 40 MiB each of embedding and head, a norm of 128 bytes: all in 16 GiB of RAM.
    return plan_of(llama(), machine("laptop-no-gpu"), context=1000)


def test_a_plan_is_told_block_by_block_and_tier_by_tier(plan: Plan) -> None:
    state = map_state(plan, model="toy", status="loaded", memory={"cpu": {"weights": 7}}, policies=NAMES)
    assert [block.label for block in state.plan.blocks][:3] == ["embed", "layers.0", "layers.1"]
    assert state.plan.blocks[1].bytes == 100 * MIB
    assert (state.plan.blocks[1].home, state.plan.blocks[1].way) == ("cpu", "cpu")
    # 1,024 bytes of keys and values a token, for 1,000 tokens.
    assert state.plan.blocks[1].cache_bytes == 1_024_000
    ram, disk = state.plan.tiers
    assert (ram.device, ram.weights, ram.now) == ("cpu", 480 * MIB + 128, {"weights": 7})
    assert (disk.device, disk.planned, disk.is_whole, disk.can_hold) == ("disk", 0, False, True)
    assert state.plan.fits


def test_a_table_is_told_from_a_matrix_that_the_head_shares(plan: Plan) -> None:
    embed, layer, *_ = plan_state(by_hand(plan, embed="disk")).blocks
    assert (embed.looks_up, embed.way, embed.home, embed.compute) == (True, "looked-up", "disk", "cpu")
    assert not layer.looks_up
    tied = plan_of(llama(tied=True), machine("laptop-no-gpu"))
    assert not plan_state(tied).blocks[0].looks_up


def test_the_last_answer_is_beside_the_forecast(plan: Plan) -> None:
    last = Footprint(generation_tps=3.5, tokens_per_sweep=2.0, limit_share=0.9)
    state = map_state(plan, last=last, policies=NAMES)
    assert (state.measured_tps, state.tokens_per_sweep, state.limit_share) == (3.5, 2.0, 0.9)


def test_what_moves_for_a_token_names_the_speed_of_its_way() -> None:
    state = plan_state(view_states.plan_of(view_states.qwen32b(), machine("rtx4090"), {"cpu": 40 * GIB}))
    moves = {(move.source, move.target): move for move in state.moves}
    assert moves["cpu", "cuda:0"].bytes_per_s == 25.0e9
    assert all(move.bytes_per_s > 0 for move in state.moves)


def test_commands_to_copy_say_what_changes(plan: Plan) -> None:
    after = by_hand(plan, l0="disk", l1="disk", l3="disk")
    state = plan_state(after, before=plan, model="toy")
    assert state.exports.command == "%llm move layers.0-1,layers.3 disk -m toy"
    assert plan_state(plan, before=plan, model="toy").exports.command == ""
    assert json.loads(state.exports.json)["model.layers.3"] == "disk"
    compile(state.exports.python, "copied", "exec")


def test_commands_of_a_plan_load_it(plan: Plan) -> None:
    limited = plan_of(llama(), machine("laptop-no-gpu"), {"cpu": 2 * GIB, "disk": 1_500_000_001})
    assert command_of(limited) == "%llm load owner/name --max-memory cpu=2GiB,disk=1500000001 -c 4096"
    named = replace(plan, policy="balanced", options={"quantize": "nf4", "dtype": "auto"})
    assert command_of(named) == "%llm load owner/name -c 1000 --quantize nf4 --device-map balanced"
    assert command_of(by_hand(plan, l0="disk")).endswith("--device-map map.json")


def test_a_folder_elsewhere_is_never_copied_as_the_name_of_another_model(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    # Without the dot it would mean a model of the hub.
    assert command_of(replace(plan, source=str(folder))) == "%llm load ./my-model -c 1000"


def test_copied_commands_are_understood(plan: Plan) -> None:
    """The words that are copied are the words that the parser takes."""
    from llm_magic.arguments import split_words
    from llm_magic.commands.help import command_parser
    from llm_magic.commands.load import LOAD
    from llm_magic.commands.move import MOVE

    limited = plan_of(llama(), machine("laptop-no-gpu"), {"cpu": 2 * GIB})
    found = command_parser(LOAD).parse(split_words(command_of(limited))[2:])
    assert found.max_memory == {"cpu": 2 * GIB}
    found = command_parser(MOVE).parse(split_words(command_of(by_hand(plan, l0="disk"), plan, "toy"))[2:])
    assert (found.blocks, found.device, found.model) == ("layers.0", "disk", "toy")


def test_no_path_and_no_user_of_this_computer_is_told(plan: Plan, tmp_path: Path) -> None:
    source = tmp_path / "secret-folder" / "model"
    source.mkdir(parents=True)
    hostile = replace(
        plan, source=str(source), warnings=(f"{source} is read", "\x1b]0;title\x07"), policy=str(source)
    )
    text = json.dumps(wire.encode(map_state(hostile, policies=NAMES)))
    assert "secret-folder" not in text
    assert str(Path.home()) not in text
    assert f"/{getpass.getuser()}/" not in text
    assert "\\u001b" not in text


@pytest.mark.parametrize("name", ["rtx4090", "laptop-no-gpu", "mac-unified", "8xh100", "two-3090"])
def test_every_example_machine_has_a_picture(name: str) -> None:
    described = read_machine(view_states.REPOSITORY / "examples" / "machines" / f"{name}.json")
    state = machine_state(described)
    assert [device.id for device in state.devices] == [device.id for device in described.devices]
    assert len(state.links) == len(described.links)
    assert state.described
