"""Constants of the cost model, fitted to what a loaded model was measured to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite

from llm_magic.events import SweepSpeed
from llm_magic.plan import Plan
from llm_magic.planning.constants import Constants, limits
from llm_magic.planning.forecast import engine_of
from llm_magic.planning.setting import Setting
from llm_magic.planning.sweep import Leg, can_capture, in_long_sweep, parts, slowest, sweep_of

_CLOSE = 0.005  # of the measured time: nothing to fit
_ROUNDS = 12
_HALVINGS = 60
_INSTEAD = {  # what else can explain a time, where a constant is at the end of its range
    "cpu_layer_s": "cpu_share",
    "cpu_share": "cpu_layer_s",
    "captured_layer_s": "gpu_share",
    "gpu_layer_s": "gpu_share",
    "gpu_share": "captured_layer_s",
    "page_cache_share": "cpu_layer_s",
    "packed_cpu_share": "cpu_layer_s",
    "packed_gpu_share": "captured_layer_s",
    "cpu_beside_bus": "cpu_layer_s",
}
_SHARES = ("cpu_share", "gpu_share")  # in whatever a device reads
_OVERHEADS = ("cpu_layer_s", "captured_layer_s", "gpu_layer_s")

_Legs = Callable[[Constants], tuple[Leg, ...]]


def fit(plan: Plan, speed: SweepSpeed, constants: Constants) -> Constants:
    """Constants with which the forecast of ``plan`` is what was measured.

    The constant behind the slowest part of a sweep changes: the share of a bandwidth, the overhead
    of a layer, the efficiency of a prefill. It stays in its sane range, so that one odd measurement
    cannot spoil every later forecast. Fitting twice changes nothing more.

    Parameters
    ----------
    speed
        Measured with the plan's blocks where the plan says, one sequence at a time.
    """
    constants = _fitted(_decode(plan), speed.decode_s, constants, _DECODE)
    if speed.prefill_tokens > 1:
        # A captured decode has no launches: then they show in the prefill.
        is_captured = can_capture(plan.layout, plan.machine, plan.placements)
        names = _PREFILL | ({"gpu_layer_s"} if is_captured else set())
        constants = _fitted(_prefill(plan, speed.prefill_tokens), speed.prefill_s, constants, names)
    return constants


_PREFILL = frozenset({"cpu_prefill", "gpu_prefill"})
_DECODE = frozenset(Constants().to_json()) - _PREFILL  # the prefill must not undo what decoding has shown


def _decode(plan: Plan) -> _Legs:
    return lambda constants: _legs(plan, constants, tokens=1)


def _prefill(plan: Plan, tokens: int) -> _Legs:
    return lambda constants: _legs(plan, constants, tokens=tokens)


def _legs(plan: Plan, constants: Constants, *, tokens: int) -> tuple[Leg, ...]:
    """What runs at the same time in a sweep of one sequence; nothing when a bandwidth is unknown."""
    engine = engine_of(Setting.of(plan, constants), plan.placements, plan.uses)
    workload = replace(plan.workload, batch=1)
    is_long = 0 < plan.long_sweep <= tokens
    placed = in_long_sweep(plan.placements) if is_long else plan.placements
    sweep = sweep_of(plan.layout, workload, placed, tokens=tokens)
    return parts(sweep, engine, is_prefill=tokens > 1) or ()


def _fitted(legs_of: _Legs, measured_s: float, constants: Constants, names: frozenset[str]) -> Constants:
    """Change the constant behind the slowest part until that part takes what was measured."""
    if not (isfinite(measured_s) and measured_s > 0):
        return constants
    for _ in range(_ROUNDS):
        legs = legs_of(constants)
        if not legs or abs(slowest(legs).seconds - measured_s) <= _CLOSE * measured_s:
            break
        better = _better(legs_of, legs.index(slowest(legs)), measured_s, constants, names)
        if better == constants:
            break
        constants = better
    return constants


def _better(
    legs_of: _Legs, index: int, measured_s: float, constants: Constants, names: frozenset[str]
) -> Constants:
    """The constants with another cause of a part's time, or those of the prefill that may be in it."""
    cause = legs_of(constants)[index].cause
    for name in (cause, _INSTEAD.get(cause, ""), *_SHARES, *sorted(_PREFILL)):
        if name in names:
            better = _solved(legs_of, index, name, measured_s, constants)
            before, after = (legs_of(c)[index].seconds for c in (constants, better))
            if abs(after - measured_s) < abs(before - measured_s) * (1 - _CLOSE):
                return better
    return constants


def _solved(legs_of: _Legs, index: int, name: str, measured_s: float, constants: Constants) -> Constants:
    """The value of one constant, by halving, with which one part of the sweep takes ``measured_s``."""
    low, high = limits(name)
    if name not in _OVERHEADS:  # a larger share takes less time
        low, high = high, low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_too_fast = legs_of(constants.changed(name, middle))[index].seconds < measured_s
        low, high = (middle, high) if is_too_fast else (low, middle)
    return constants.changed(name, float(f"{(low + high) / 2:.6g}"))
