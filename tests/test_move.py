"""A loaded model is placed anew: what is planned, what moves, what comes back, what is said."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llm_magic.commands.help import command_parser
from llm_magic.errors import EngineError, LLMMagicError, OptionError, PlanError, SessionError
from llm_magic.events import Finish, StopFlag
from llm_magic.hookspecs import hookimpl
from llm_magic.model import ModelSpec
from llm_magic.notebook import Notebook
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.placing import as_if_unloaded, changes_in_words
from llm_magic.plan import Forecast
from llm_magic.session import Session
from llm_magic.units import GIB, MIB
from tests import layouts
from tests.fake_backend import FakeBackend, plugins_with

IN_RAM = ["cpu", "cpu", "cpu"]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def session(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path))
    session = Session(plugins_with(backend), notebook=Notebook({}))
    session.load(ModelSpec("fake:a"), LoadOptions(), "a")
    return session


def homes(session: Session) -> list[str]:
    return list(session.model().plan.device_map.values())


def command(session: Session, line: str) -> str:
    """Text that ``%llm LINE`` shows."""
    name, *words = line.split()
    found = session.plugins.commands[name]
    return found.run(session, command_parser(found).parse(words)).text


class PressingStop:
    """A screen whose user presses Ctrl-C at the first progress of a move."""

    def __init__(self, go: threading.Event) -> None:
        self._go = go

    def progress(self, title, cancel):
        return self

    def update(self, event):
        if event is not None and event.phase == "moving":
            self._go.set()
            raise KeyboardInterrupt

    def close(self, summary):
        self.summary = summary


# Where blocks go


def test_blocks_move_and_the_chat_goes_on(session, backend) -> None:
    backend.enqueue("one")
    backend.enqueue("two")
    session.ask("first")
    moved = session.move("layers.1-2", "disk")
    assert homes(session) == ["cpu", "disk", "disk"]
    assert moved.bytes == {("cpu", "disk"): 2 * MIB}
    assert changes_in_words(moved.before, moved.after)[0] == "layers.1–2 (2.0 MiB) RAM → disk"
    session.ask("second")
    assert len(backend.engines) == 1
    assert backend.engines[0].forgotten == []
    assert len(backend.engines[0].requests[1].messages) == 3


@pytest.mark.parametrize("device", ["ram", "gpu", "0", "tape", "cuda"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(session, device) -> None:
    with pytest.raises(PlanError, match=r"There is no (device|GPU)") as caught:
        session.move("layers.1", device)
    assert "Devices: cpu, disk" in caught.value.next_step


def test_blocks_that_are_not_there_are_refused(session) -> None:
    for blocks in ("layers.99", "nothing", "layers.1-9", ""):
        with pytest.raises(LLMMagicError) as caught:
            session.move(blocks, "disk")
        assert caught.value.next_step
    assert homes(session) == IN_RAM


def test_a_placement_is_a_map_a_file_a_policy_or_a_plan(session, tmp_path) -> None:
    session.apply({"": "cpu", "layers.0": "disk"})
    assert homes(session) == ["disk", "cpu", "cpu"]
    assert session.model().plan.policy == "hand"
    first = session.model().plan
    (tmp_path / "map.json").write_text(json.dumps({"": "disk", "layers.0": "cpu"}))
    session.apply(str(tmp_path / "map.json"))
    assert homes(session) == ["cpu", "disk", "disk"]
    assert session.model().plan.policy == "map.json"
    session.apply("cpu")
    assert homes(session) == IN_RAM
    session.apply(first)
    assert homes(session) == ["disk", "cpu", "cpu"]


@pytest.mark.parametrize("target", [{"": "tape"}, {"layers.7": "cpu"}, {"layers.0": "cpu"}, {0: "cpu"}])
def test_a_map_that_is_none_moves_nothing(session, target) -> None:
    with pytest.raises(PlanError) as caught:
        session.apply(target)
    assert caught.value.next_step
    assert (homes(session), session.model().history) == (IN_RAM, [])


def test_the_context_stays_and_limits_stay_unless_others_are_given(session) -> None:
    # 3 MiB of weights; a limit of 2.9 MiB for all of RAM holds two blocks at the most.
    session.load(ModelSpec("fake:b"), LoadOptions(max_memory={"cpu": 29 * MIB // 10}, ctx_size=64), "b")
    assert "disk" in homes(session)
    with pytest.raises(PlanError) as caught:
        session.apply("cpu")
    assert "--max-memory cpu=" in caught.value.next_step
    assert "disk" in homes(session)
    session.apply("cpu", max_memory={"cpu": 100 * MIB})
    assert homes(session) == IN_RAM
    assert session.model().plan.budget.limits["cpu"] == 100 * MIB
    assert session.model().plan.workload.context_length == 64
    session.undo()
    assert "disk" in homes(session)
    assert session.model().plan.budget.limits["cpu"] == 29 * MIB // 10


def test_what_the_model_holds_counts_as_free(backend, cache_folder) -> None:
    """A GPU of 5.5 MiB, of which 4.8 may be used, holds 3 MiB of weights: 1.8 are free beside the model."""
    backend.gpu_bytes = 11 * MIB // 2
    session = Session(plugins_with(backend))
    session.load(ModelSpec("fake:a"), LoadOptions(), "a")
    assert homes(session) == ["cuda:0"] * 3
    session.move("layers.0", "cpu")  # 2 MiB stay: more than is free
    assert homes(session) == ["cpu", "cuda:0", "cuda:0"]
    session.undo()
    assert homes(session) == ["cuda:0"] * 3


def test_bytes_that_a_model_gives_back_are_counted_by_device() -> None:
    machine = layouts.machine(
        layouts.gpu(0, 24 * GIB, 2 * GIB), layouts.ram(64 * GIB, 40 * GIB), layouts.disk(500 * GIB, 7 * GIB)
    )
    held = {
        "cuda:0": {"weights": 19 * GIB, "kv_cache": GIB},
        "cpu": {"weights": 30 * GIB},
        "disk": {"weights": GIB},
    }
    free = {device.id: device.free_bytes for device in as_if_unloaded(machine, held).devices}
    # 2 + 19 + 1; 40 + 30, but there are 64 only; files stay on the disk
    assert free == {"cuda:0": 22 * GIB, "cpu": 64 * GIB, "disk": 7 * GIB}


def test_a_shared_memory_gets_its_bytes_back_on_both_of_its_names() -> None:
    held = {"mps": {"weights": 2 * GIB}, "cpu": {"weights": GIB}}
    machine = as_if_unloaded(layouts.mac(), held)
    assert (machine.device("mps").free_bytes, machine.device("cpu").free_bytes) == (33 * GIB, 37 * GIB)


# Nothing lost


def test_the_same_placement_changes_nothing(session) -> None:
    moved = session.apply("cpu")
    assert (moved.count, moved.bytes, session.model().history) == (0, {}, [])
    assert repr(moved) == "<Moved a: nothing changed>"


@pytest.mark.parametrize("is_too_late", [False, True])
def test_an_interrupted_move_puts_everything_back(session, backend, is_too_late) -> None:
    go = threading.Event()
    session.screen = PressingStop(go)
    backend.engines[0].while_moving = (lambda: None) if is_too_late else go.wait
    with pytest.raises(KeyboardInterrupt):
        session.move("layers.0-2", "disk")
    assert "stopped after" in session.screen.summary
    assert (homes(session), session.model().history) == (IN_RAM, [])


def test_an_engine_that_fails_leaves_everything_where_it_was(session, backend) -> None:
    def fail() -> None:
        raise OSError("no space left")

    backend.engines[0].while_moving = fail
    with pytest.raises(EngineError, match="no space left") as caught:
        session.move("layers.0", "disk")
    assert "%llm map" in caught.value.next_step
    assert (homes(session), session.model().history) == (IN_RAM, [])


def test_moving_while_generating_is_refused(session, backend) -> None:
    errors = []

    def move_meanwhile(_: StopFlag) -> None:
        try:
            session.move("layers.0", "disk")
        except SessionError as error:
            errors.append(error.message)

    backend.enqueue("one", "two", before={1: move_meanwhile})
    assert session.ask("go") == "onetwo"
    assert errors == ["A model is still at work."]
    assert homes(session) == IN_RAM


def test_undo_goes_back_step_by_step(session) -> None:
    session.move("layers.0", "disk")
    session.move("layers.1", "disk")
    assert session.undo().count == 1
    assert homes(session) == ["disk", "cpu", "cpu"]
    session.undo()
    assert homes(session) == IN_RAM
    assert session.model().plan.policy == "auto"
    with pytest.raises(SessionError, match="nothing to undo") as caught:
        session.undo()
    assert "%llm move" in caught.value.next_step


def test_another_loaded_model_can_be_moved(session) -> None:
    session.load(ModelSpec("fake:b"), LoadOptions(), "b")
    session.move("layers.0", "disk", name="a")
    assert homes(session) == IN_RAM
    assert session.model("a").plan.device_map["model.layers.0"] == "disk"
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    assert session.undo("a").name == "a"


def test_observers_hear_of_moves(backend) -> None:
    seen: list[object] = []

    def session_event(session: Session, event: object) -> None:
        seen.append(event)

    session = Session(plugins_with(backend, SimpleNamespace(session_event=hookimpl(session_event))))
    session.load(ModelSpec("fake:a"), LoadOptions(), "a")
    moved = session.move("layers.0", "disk")
    assert seen == [session.model(), moved]


def test_blocks_that_the_engine_moved_by_itself_are_where_it_says(session, backend) -> None:
    engine, elsewhere = backend.engines[0], session.propose({"": "cpu", "layers.2": "disk"})

    def run_out_of_memory(_: StopFlag) -> None:
        engine.plan = elsewhere

    note = "layers.2 moved to disk: memory ran out"
    backend.enqueue("one", "two", before={1: run_out_of_memory}, notes=(note,))
    footprint = session.ask("go", AskOptions()).footprint
    assert footprint.placement == "67 % RAM · 33 % disk"
    assert footprint.notes == (note,)
    assert homes(session) == ["cpu", "cpu", "disk"]


# What is said


def test_move_says_what_moved_the_forecasts_and_the_map(session) -> None:
    shown = command(session, "move layers.1-2 disk")
    assert shown.startswith("layers.1–2 (2.0 MiB) RAM → disk, ")
    (forecast,) = [line for line in shown.splitlines() if line.startswith("forecast: ")]
    assert forecast.count(" → ") == forecast.count(" tok/s") == 2
    assert "Disk: layers.1–2" in shown
    assert "RAM: layers.0" in shown


def test_a_dry_run_moves_nothing_and_shows_the_plan(session) -> None:
    shown = command(session, "move layers.1 disk --dry-run")
    assert "This would move:\n  layers.1 (1.0 MiB) RAM → disk" in shown
    assert "placed by hand" in shown
    assert homes(session) == IN_RAM
    assert "This would move:\n  nothing" in command(session, "apply cpu --dry-run")


def test_a_dry_run_of_what_does_not_fit_says_why(session) -> None:
    assert "✗" in command(session, "apply cpu --dry-run --max-memory cpu=1MiB")


def test_apply_takes_variables_after_policies(session) -> None:
    session.notebook.namespace |= {
        "mine": {"": "cpu", "layers.2": "disk"},
        "cpu": {"": "disk"},
        "text": "cpu",
    }
    command(session, "apply mine")
    assert homes(session) == ["cpu", "cpu", "disk"]
    assert command(session, "apply mine") == "Nothing changed: every block of a is there already."
    session.notebook.namespace["plan"] = session.propose({"": "disk"})
    command(session, "apply plan")
    assert homes(session) == ["disk"] * 3
    command(session, "apply cpu")
    assert homes(session) == IN_RAM
    with pytest.raises(OptionError, match="holds no placement, but a value of type str"):
        command(session, "apply text")


def test_undo_shows_the_way_back(session) -> None:
    command(session, "move layers.0 disk")
    assert command(session, "undo").startswith("layers.0 (1.0 MiB) disk → RAM, ")


def test_ps_and_status_say_how_the_model_runs(session, backend) -> None:
    assert "scripted · no draft" in command(session, "ps")
    assert "scripted · no draft" in command(session, "status")
    assert "MiB moved" not in command(session, "status")
    moving = Forecast(5.0, 0.0, "bus", {("cpu", "cuda:0"): 6 * MIB, ("cuda:0", "cuda:0"): MIB}, limit_tps=2.5)
    backend.engines[0].plan = replace(session.model().plan, forecast=moving)
    assert "a: 6.0 MiB moved per token · scripted · no draft" in command(session, "ps")
    # Three tokens after the first in one second: 3 tok/s by 2 sweeps, which is 2 of the 2.5 that are possible.
    backend.enqueue("a", "b", "c", "d", sweeps=2)
    footprint = session.ask("go").footprint
    assert (footprint.tokens_per_sweep, footprint.moved_bytes) == (1.5, 4 * MIB)
    assert footprint.limit_share == pytest.approx(0.8)
    assert "a: 4.0 MiB moved per token · 80 % of the limit · scripted" in command(session, "ps")
    assert "6.0 MiB moved, 80 % of the limit" in command(session, "status")
    session.apply({"": "disk"})
    assert "of the limit" not in command(session, "status")  # that was measured elsewhere


def test_a_limit_that_is_passed_was_measured_too_low(session, backend) -> None:
    slow = Forecast(5.0, 0.0, "bus", {("cpu", "cuda:0"): MIB}, limit_tps=0.5)
    backend.engines[0].plan = replace(session.model().plan, forecast=slow)
    backend.enqueue("a", "b")
    assert session.ask("go").footprint.limit_share == 1.0
    backend.engines[0].plan = replace(session.model().plan, forecast=replace(slow, limit_tps=0.0))
    backend.enqueue("a", "b")
    assert session.ask("go").footprint.limit_share == 0.0


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_that_moved_because_memory_ran_out_come_back_by_undo(session, fails, monkeypatch) -> None:
    model = session.model("a")
    before, there = model.plan, session.propose({"": "disk"}, "a")

    def generate(_request, _emit, _stop):
        model.engine.plan = there
        if fails:
            raise EngineError("Memory ran out.", "Leave more.")
        return Finish("stop", 1, 0, 1, 0.5, 0.5)

    monkeypatch.setattr(model.engine, "generate", generate)
    if fails:
        with pytest.raises(EngineError):
            session.ask("Hello")
        assert model.last is None
    else:
        session.ask("Hello")
    assert session.model("a").plan is there
    session.undo("a")
    assert session.model("a").plan.device_map == before.device_map
