"""Forecasts held against what a computer does, and what is learned of it kept for later plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llm_magic.events import Progress, SweepSpeed
from llm_magic.hookspecs import Engine
from llm_magic.host.contention import Moment, taken_by_others
from llm_magic.host.measurements import here, load_fit, save_fit
from llm_magic.machine import Machine
from llm_magic.model import ModelLayout
from llm_magic.plan import Forecast, Plan
from llm_magic.planning.constants import Constants
from llm_magic.planning.fitting import fit
from llm_magic.planning.forecast import make_forecast
from llm_magic.planning.setting import Setting

_ALIKE = 2  # times as wide


@dataclass(frozen=True)
class Comparison:
    """One rate in tokens per second: measured, and forecast before and after."""

    what: str
    measured_tps: float
    before_tps: float
    after_tps: float


@dataclass(frozen=True)
class Calibration:
    """What ``%llm bench`` found.

    ``machine`` was measured anew. With a model loaded, ``name`` is its name, ``speed`` what its
    sweeps took, and ``comparisons`` hold forecasts against that; an engine that takes no time has
    none of both. ``others`` is the share of the processor that other programs took meanwhile, where
    nothing of it was left.
    """

    machine: Machine
    name: str = ""
    speed: SweepSpeed | None = None
    comparisons: tuple[Comparison, ...] = ()
    others: float = 0.0


def kept_constants(layout: ModelLayout, machine: Machine) -> Constants:
    """Constants of the cost model as they were fitted on this computer, to this model or to one like it.

    Without a fit, and on a machine that a file describes, what its devices tell.
    """
    measured, key = Constants.of(machine, layout), _key(layout)
    if machine.described:
        return measured
    return Constants.from_json(load_fit(*here(), key, lambda other: _is_alike(key, other)), measured)


def keep_constants(layout: ModelLayout, constants: Constants, measured: Constants) -> None:
    """Keep what was fitted to a model, for its later plans and those of models that were never measured.

    Parameters
    ----------
    measured
        What the machine's devices tell: where the fit agrees, later measurements count.
    """
    told = measured.to_json()
    fitted = {name: value for name, value in constants.to_json().items() if value != told[name]}
    save_fit(*here(), _key(layout), fitted)


def calibrate(name: str, engine: Engine, measured: Callable[[], Machine], progress: Progress) -> Calibration:
    """Measure the sweeps of the model called ``name``, and forecast them better from now on.

    Parameters
    ----------
    measured
        Measures the machine; what the model holds counts as free. Asked after the sweeps, for which the engine has
        seen to it that nothing of its own runs beside them.
    """
    old = kept_constants(engine.plan.layout, engine.plan.machine)
    before = Moment.now()
    speed = engine.measure(progress)
    others = taken_by_others(before, Moment.now())
    machine = measured()
    if speed.decode_s <= 0:
        return Calibration(machine, name)
    workload = replace(engine.plan.workload, prefill_tokens=max(1, speed.prefill_tokens))
    was = replace(engine.plan, workload=workload)
    now = replace(was, machine=machine)
    constants = fit(now, speed, kept_constants(now.layout, machine))
    keep_constants(now.layout, constants, Constants.of(machine, now.layout))
    found = tuple(_compared(speed, _forecast(was, old), _forecast(now, constants)))
    plan = replace(now, workload=engine.plan.workload)
    engine.apply(replace(plan, forecast=_forecast(plan, constants)), progress)  # nothing moves
    return Calibration(machine, name, speed, found, others)


def _forecast(plan: Plan, constants: Constants) -> Forecast:
    return make_forecast(Setting.of(plan, constants), plan.placements, plan.uses)


def _compared(speed: SweepSpeed, before: Forecast, after: Forecast) -> Iterator[Comparison]:
    if speed.decode_s > 0:
        yield Comparison("decode", 1 / speed.decode_s, before.decode_tps, after.decode_tps)
    if speed.prefill_s > 0:
        tokens, rates = speed.prefill_tokens, (before.prefill_tps, after.prefill_tps)
        yield Comparison(f"prefill of {tokens}", tokens / speed.prefill_s, *rates)


def _key(layout: ModelLayout) -> str:
    shape = f"{len(layout.layers)}x{layout.hidden_size}"
    methods = layout.quantization or "unpacked", layout.expert_quantization, layout.head_quantization
    packing = "+".join(filter(None, methods))
    return " ".join((layout.architecture, shape, layout.dtype, packing))


def _is_alike(key: str, other: str) -> bool:
    """Whether layers of two models take the same kernels at about the same size: one tells of the other."""
    own, its = key.split(), other.split()
    if len(its) != len(own) or own[2:] != its[2:]:
        return False
    width, its_width = (part[1].partition("x")[2] for part in (own, its))
    sizes = int(width) if width.isdecimal() else 0, int(its_width) if its_width.isdecimal() else 0
    return 0 < max(sizes) <= _ALIKE * min(sizes)
