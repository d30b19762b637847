"""llm_magic's own engine, planned by its own planner for the machine at hand."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock, weight_files
from llm_magic.backends.accelerate.backend import TransformersBackend
from llm_magic.calibration import kept_constants
from llm_magic.events import Message, Request, Sampling, TokenEvent
from llm_magic.folders import cache_folder, make_private
from llm_magic.host.probe import probe_machine
from llm_magic.machine import Machine
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan, refusal
from llm_magic.units import MIB
from llm_magic.views.words import moved_bytes


class EngineSubject:
    """A loaded engine.

    Parameters
    ----------
    source
        A model's folder, or ``"starter"``.
    device_map
        Module names to devices.
    hybrid
        Whether the planner may let the CPU compute blocks beside a GPU.
    split
        Whether the CPU may compute the experts of layers of which a GPU has the rest.
    compiled
        Whether layers are compiled in the background, which takes cores and the device from others meanwhile.
    least_ram
        Plan as if hardly more RAM were free than the plan needs: what is on disk is then read in every
        sweep, not used in the page cache and not kept in RAM.
    """

    def __init__(
        self,
        source: str,
        device_map: Mapping[str, str],
        *,
        quantize: str = "",
        quantize_head: str = "",
        context: int = 1024,
        hybrid: bool = True,
        split: bool = True,
        compiled: bool = True,
        least_ram: bool = False,
    ) -> None:
        backend = TransformersBackend()
        spec = ModelSpec(source, quantize=quantize, quantize_head=quantize_head)
        layout = backend.layout(spec, _ignore)
        make_private(cache_folder())
        machine = on_a_thread(lambda: probe_machine(backend.accelerators, disk_folder=cache_folder()))
        if not split:
            layout = replace(layout, details={**layout.details, "routed_experts": False})
        if not hybrid:
            machine = _with_cpu(machine, read_bytes_per_s=0.0)
        plan = _plan(layout, machine, device_map, context, quantize)
        if least_ram:
            plan = _in_least_ram(plan, device_map, context, quantize)
        if not plan.fits:
            raise refusal(plan)
        started = time.perf_counter()
        self._engine = on_a_thread(lambda: backend.load(spec, plan, _ignore))
        self._load_s = time.perf_counter() - started
        warm_up = self._engine._quick._warm_up
        if warm_up is not None and not compiled:
            warm_up.give_up("not asked for")
        self._files = weight_files(source)
        self._is_warm = False

    def measure(
        self,
        prompt: str,
        tokens: int,
        *,
        lookup: int | None = 0,
        cold: bool = False,
        warm_up_s: float = 0.0,
    ) -> dict[str, Any]:
        """One answer.

        Parameters
        ----------
        lookup
            Tokens that prompt lookup may propose at a time; ``None`` leaves that to the engine.
        warm_up_s
            How long to wait until layers that are compiled in the background are ready, the first time.
        """
        if warm_up_s and not self._is_warm:
            self._warm_up(prompt, warm_up_s)
        read = _bytes_read()
        clock, text, finish = self._answer(prompt, tokens, lookup, cold)
        plan = self._engine.plan
        found: dict[str, Any] = clock.rates(finish.prompt_tokens)
        found |= {
            "answer": text.strip(),
            "load_s": self._load_s,
            "moved_bytes": moved_bytes(plan),
            "read_bytes_per_sweep": (_bytes_read() - read)
            / (1 + (finish.sweeps or finish.generated_tokens - 1)),
            "forecast_tps": plan.forecast.decode_tps,
            "limit_tps": plan.forecast.limit_tps,
            "ways": _ways(plan),
            "status": list(self._engine.status()),
        }
        if finish.sweeps:
            found["tokens_per_sweep"] = (finish.generated_tokens - 1) / finish.sweeps
        return found

    def close(self) -> None:
        """Give everything back."""
        self._engine.close()

    def _answer(self, prompt: str, tokens: int, lookup: int | None, cold: bool) -> tuple[Clock, str, Any]:
        extra = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        sampling = Sampling(temperature=0, max_new_tokens=tokens, extra=extra)
        request = Request((Message("user", prompt),), sampling, use_template=False)

        def answer() -> tuple[Clock, str, Any]:
            clock = Clock(self._files if cold else ())
            pieces: list[str] = []

            def emit(event: Any) -> None:
                if isinstance(event, TokenEvent):
                    pieces.append(event.text)
                    if event.tokens:
                        clock.tick(event.tokens)

            finish = self._engine.generate(request, emit, threading.Event())
            return clock, "".join(pieces), finish

        found: tuple[Clock, str, Any] = on_a_thread(answer)
        return found

    def _warm_up(self, prompt: str, most_s: float) -> None:
        end = time.perf_counter() + most_s
        self._answer(prompt, 8, 0, False)
        while time.perf_counter() < end and any("background" in said for said in self._engine.status()):
            time.sleep(0.5)
        self._answer(prompt, 8, 0, False)  # captures what is ready now
        self._is_warm = True


def on_a_thread(work: Callable[[], Any]) -> Any:
    """Run something where a session runs it: on a thread of its own.

    GNU OpenMP has a team of threads for each thread that computes, until that ends. With two teams
    there are more threads than cores, and they sleep much sooner: on 2 cores a third of the speed is lost.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _plan(
    layout: ModelLayout, machine: Machine, device_map: Mapping[str, str], context: int, quantize: str
) -> Plan:
    return make_plan(
        layout,
        machine,
        Workload(context),
        placement=_known(layout, device_map),
        policy="benchmark",
        options={"quantize": quantize} if quantize else {},
        constants=kept_constants(layout, machine),
    )


def _known(layout: ModelLayout, device_map: Mapping[str, str]) -> dict[str, str]:
    """The map for the blocks that there are: a tied head and rotary tables may not be blocks of their own."""
    names = {block.name for block in layout.blocks}
    return {name: device for name, device in device_map.items() if not name or name in names}


def _in_least_ram(plan: Plan, device_map: Mapping[str, str], context: int, quantize: str) -> Plan:
    """The plan for the least free RAM in which it fits, by steps of a MiB."""

    def planned(mib: int) -> Plan:
        machine = _with_cpu(plan.machine, free_bytes=mib * MIB)
        return _plan(plan.layout, machine, device_map, context, quantize)

    most = plan.machine.device("cpu").free_bytes // MIB
    return planned(bisect_left(range(most), True, key=lambda mib: planned(mib).fits))


def _with_cpu(machine: Machine, **facts: Any) -> Machine:
    devices = tuple(replace(d, **facts) if d.id == "cpu" else d for d in machine.devices)
    return replace(machine, devices=devices)


def _ways(plan: Plan) -> dict[str, int]:
    """How many blocks are treated in each way."""
    found: dict[str, int] = {}
    for place in plan.placements:
        way = "mapped" if place.way == "read" and plan.mapped else place.way
        found[way] = found.get(way, 0) + 1
    return found


def _bytes_read() -> int:
    """Bytes that this process asked the system for with reads; 0 where nobody counts."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar")), 0)


def _ignore(_event: object) -> None:
    """Progress that nobody looks at."""
