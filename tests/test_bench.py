"""What ``%llm bench`` measures, what it learns of it, and what it says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic import calibration
from llm_magic.calibration import kept_constants
from llm_magic.commands import bench as bench_command
from llm_magic.commands.help import command_parser
from llm_magic.errors import EngineError, OptionError
from llm_magic.events import SweepSpeed
from llm_magic.host.measurements import here, load_measurements
from llm_magic.machine import Link
from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions
from llm_magic.plan import Plan
from llm_magic.planning.constants import Constants
from llm_magic.session import Session
from llm_magic.units import format_rate
from tests.fake_backend import FakeBackend, plugins_with
from tests.layouts import h100

TOKENS = 2000  # of the prompt that is timed


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Measurements of this computer, made once; no model was fitted on it yet."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_MAGIC_CACHE", str(folder))
        Session(plugins_with(FakeBackend())).machine()
    return folder


@pytest.fixture
def session(backend, measured, cache_folder, tmp_path, monkeypatch):
    shutil.copytree(measured, cache_folder)
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path))
    session = Session(plugins_with(backend))
    session.load(ModelSpec("fake:a"), LoadOptions(), "a")
    backend.engines[0].speed = three_times_slower(session)
    return session


def three_times_slower(session: Session) -> SweepSpeed:
    """Than the forecast of the loaded plan."""
    forecast = session.model().plan.forecast
    prefill_s = 3 * TOKENS / forecast.prefill_tps
    return SweepSpeed(3 / forecast.decode_tps, prefill_s, TOKENS, {1: 0.02, 4: 0.025, 8: 0.04})


def bench(session: Session, *words: str) -> str:
    command = session.plugins.commands["bench"]
    return command.run(session, command_parser(command).parse(words)).text


def kept_of(plan: Plan) -> Constants:
    return kept_constants(plan.layout, plan.machine)


def test_the_forecast_after_a_bench_is_what_was_measured(session, backend) -> None:
    speed, found = backend.engines[0].speed, session.bench()
    assert [c.what for c in found.comparisons] == ["decode", "prefill of 2000"]
    measured = [1 / speed.decode_s, TOKENS / speed.prefill_s]
    assert [c.measured_tps for c in found.comparisons] == pytest.approx(measured)
    for comparison in found.comparisons:
        assert comparison.before_tps != pytest.approx(comparison.measured_tps, rel=0.15)
        assert comparison.after_tps == pytest.approx(comparison.measured_tps, rel=0.15)


def test_the_loaded_plan_and_later_plans_know_it(session, backend) -> None:
    before, measured_tps = session.model().plan, 1 / backend.engines[0].speed.decode_s
    session.bench()
    now = session.model().plan
    assert now.forecast.decode_tps == pytest.approx(measured_tps, rel=0.15)
    assert (now.placements, now.workload) == (before.placements, before.workload)
    assert session.plan(ModelSpec("fake:a"), LoadOptions()).forecast.decode_tps == pytest.approx(
        measured_tps, rel=0.15
    )
    assert session.propose("cpu").forecast.decode_tps == pytest.approx(measured_tps, rel=0.15)
    later = Session(plugins_with(backend)).plan(ModelSpec("fake:a"), LoadOptions())
    assert later.forecast.decode_tps == pytest.approx(measured_tps, rel=0.15)


def test_a_model_that_was_never_measured_gets_the_newest_fit(session) -> None:
    plan = session.model().plan
    other = replace(plan, layout=replace(plan.layout, architecture="OtherForCausalLM"))
    assert kept_of(other) == Constants()
    session.bench()
    assert kept_of(plan) != Constants()
    assert kept_of(other) == kept_of(plan)


def test_a_described_machine_is_planned_with_the_defaults(session, tmp_path) -> None:
    path = tmp_path / "box.json"
    path.write_text('{"devices": [{"id": "cpu", "total": "8GiB", "read": "20GB/s", "flops": 1e12}]}')
    options = LoadOptions(machine=str(path))
    before = session.plan(ModelSpec("fake:a"), options).forecast
    session.bench()
    assert session.plan(ModelSpec("fake:a"), options).forecast == before


def test_the_machine_alone(session, backend) -> None:
    found = session.bench(machine_only=True)
    assert (found.speed, found.comparisons) == (None, ())
    assert load_measurements(*here()) is not None
    assert kept_of(session.model().plan) == Constants()
    session.unload()
    shown = bench(session)
    assert "RAM, read" in shown
    assert "With a model loaded" in shown
    assert "FORECAST" not in shown


def test_what_is_shown(session, backend) -> None:
    shown = bench(session)
    for ceiling in ("RAM, read", "CPU, compute", "disk → RAM"):
        (line,) = [line for line in shown.splitlines() if line.startswith(ceiling)]
        assert "≈" not in line
    (decode,) = [line for line in shown.splitlines() if line.startswith("decode")]
    assert format_rate(1 / backend.engines[0].speed.decode_s) in decode
    assert decode.count("%)") == 2
    assert "8                  40 ms  200 tok/s" in shown  # 8 tokens in 40 ms
    assert "Plans on this computer are made with these figures from now on." in shown


def test_what_cpu_and_bus_reach_together_is_shown() -> None:
    machine = h100()
    devices = tuple(replace(d, beside_bytes_per_s=4.4e10) if d.id == "cpu" else d for d in machine.devices)
    links = (Link("cpu", "cuda:0", 5.47e10, "pinned copies", beside_bytes_per_s=5.1e10),)
    rows = [row[:2] for row in bench_command._ceilings(replace(machine, devices=devices, links=links))]
    assert ["RAM, read beside the bus", "44.0 GB/s"] in rows
    assert ["RAM → cuda:0, beside the CPU", "51.0 GB/s"] in rows


def test_other_programs_are_named(session, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "taken_by_others", lambda _before, _after: 0.42)
    assert "Other programs took 42 % of the processor meanwhile" in " ".join(bench(session).split())


def test_an_engine_that_has_nothing_to_measure_is_no_obstacle(session, backend) -> None:
    backend.engines[0].speed = SweepSpeed(0.0, 0.0, 0)
    assert session.bench().comparisons == ()
    assert kept_of(session.model().plan) == Constants()


def test_a_model_that_fails_is_said_in_words(session, backend) -> None:
    def fail() -> None:
        raise RuntimeError("sizes do not match")

    backend.engines[0].while_measuring = fail
    with pytest.raises(EngineError, match="a could not be measured: RuntimeError: sizes") as caught:
        session.bench()
    assert "--machine-only" in caught.value.next_step
    assert kept_of(session.model().plan) == Constants()


def test_a_model_that_is_not_loaded_cannot_be_measured(session) -> None:
    with pytest.raises(OptionError, match="no loaded model 'b'"):
        session.bench("b")
