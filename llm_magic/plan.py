"""Where every block lives and what that costs: the nouns of a placement.

``planning/planner.py`` makes plans; backends load them; views show them. Nothing here computes a placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from llm_magic.events import PhaseEvent
from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout

Way = Literal["resident", "streamed", "split", "cpu", "read", "kept", "looked-up", "idle"]


@dataclass(frozen=True)
class Workload:
    """What the model will be asked to do, which decides everything beside the weights.

    Attributes
    ----------
    context_length
        Tokens of prompt and answer together that the KV cache is planned for.
    batch
        Sequences at a time.
    prefill_tokens
        Tokens of one prefill pass, for the activation peak and the prefill forecast.
    """

    context_length: int
    batch: int = 1
    prefill_tokens: int = 512

    def cache_bytes(self, block: Block) -> int:
        """KV cache or state bytes of ``block``."""
        return self.batch * block.cache.bytes_for(self.context_length)

    def largest_cache_bytes(self, layout: ModelLayout) -> int:
        """KV cache or state bytes of the block that keeps most."""
        return self.batch * max(
            (cost.bytes_for(self.context_length) for cost in layout.cache_costs), default=0
        )


@dataclass(frozen=True)
class MemoryBudget:
    """How many bytes a plan may use on each device.

    ``limits`` is Accelerate's ``max_memory`` with devices as names; ``reserve`` is what was kept
    back from the free bytes to get there (the driver's context, fragmentation, other programs).
    ``explicit`` holds the devices whose limit the user gave.
    """

    limits: Mapping[str, int]
    reserve: Mapping[str, int] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placement:
    """One block: the device where its weights live, and the one where it computes.

    ``compute`` is ``"cpu"`` for a block in RAM that the CPU computes, also beside a GPU. ``kept``
    says that a copy of a block on disk stays in RAM, so that it is read once only. ``prefill``
    names the GPU that computes such a block in long sweeps (`Plan.long_sweep`), to which its weights
    stream then: a CPU decodes as fast as it reads, but it multiplies slowly. Empty: always ``compute``.
    ``is_split`` says that the CPU computes a block's routed experts, in RAM, and the GPU that ``compute`` names
    everything else of it, which stays there: attention, router, shared experts. Its ``prefill`` is for the experts.
    An idle block (`Block.is_idle`) computes nowhere; its ``compute`` is a device where others do.
    Of a table that is not where it computes, rows are looked up where it is, and they alone travel.
    """

    block: Block
    home: str
    compute: str
    kept: bool = False
    prefill: str = ""
    is_split: bool = False

    @property
    def is_offloaded(self) -> bool:
        """Whether the weights travel before they are used."""
        stays = self.block.is_idle or self.is_looked_up or self.is_split
        return self.home != self.compute and not stays

    @property
    def computing(self) -> tuple[str, ...]:
        """The devices that compute it in every sweep."""
        return (self.compute, "cpu") if self.is_split else (self.compute,)

    @property
    def rest_bytes(self) -> int:
        """Of a split block, the weights that stay where the rest of it computes; 0 for others."""
        return self.block.bytes - self.block.expert_bytes if self.is_split else 0

    @property
    def home_bytes(self) -> int:
        """Weights that live at ``home``: all of them, or the experts of a split block."""
        return self.block.bytes - self.rest_bytes

    @property
    def is_looked_up(self) -> bool:
        """Whether the CPU looks up rows of it, in RAM or in a mapped file, for another device or for itself."""
        is_away = self.home != self.compute and self.home in ("cpu", "disk")
        return self.block.looks_up and is_away and not self.kept

    @property
    def fetched_to(self) -> str:
        """The device to whose slots the weights come, in every sweep or in long ones; empty for none.

        A block on disk that the CPU computes counts, though it may be used in the page cache.
        """
        stays = not self.is_offloaded or (self.kept and self.compute == "cpu")
        return self.prefill or ("" if stays else self.compute)

    @property
    def modules_on(self) -> str:
        """Where the block's buffers are, and what is added to it: where it could run as it is placed."""
        if not self.block.is_idle:
            return self.compute
        return "cpu" if self.home == "disk" else self.home

    @property
    def way(self) -> Way:
        """What happens to the block in every sweep.

        ``"resident"``: nothing moves; ``"streamed"``: from RAM to the device that computes;
        ``"split"``: the CPU computes its experts in RAM, a GPU the rest;
        ``"cpu"``: it stays in RAM and the CPU computes it, beside a GPU or alone; ``"read"``: from
        the disk; ``"kept"``: as ``streamed`` or ``cpu``, from the copy in RAM of a block on disk;
        ``"looked-up"``: a table stays where it is, and rows of it go to the device that computes;
        ``"idle"``: nothing, wherever it is.
        """
        ways: tuple[tuple[bool, Way], ...] = (
            (self.block.is_idle, "idle"),
            (self.is_looked_up, "looked-up"),
            (self.is_split, "split"),
            (self.kept, "kept"),
            (self.home == "disk", "read"),
            (self.compute == "cpu", "cpu"),
            (self.is_offloaded, "streamed"),
        )
        return next((way for is_it, way in ways if is_it), "resident")


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of one device by purpose.

    ``slots`` is the room in which offloaded blocks arrive (on a GPU, or in RAM on their way from
    the disk); ``kept`` the copies in RAM of blocks on disk; ``split`` what a GPU has of blocks whose
    experts are in RAM; ``draft`` a draft model with its KV cache; ``activations`` the peak of hidden
    states and logits; ``other`` what this and other processes hold already; ``limit`` the budget.
    """

    device: str
    total: int
    limit: int
    weights: int = 0
    buffers: int = 0
    kv_cache: int = 0
    activations: int = 0
    slots: int = 0
    kept: int = 0
    split: int = 0
    draft: int = 0
    reserve: int = 0
    other: int = 0

    @property
    def planned(self) -> int:
        """Bytes that this plan will take, to hold against ``limit``."""
        held = self.weights + self.split + self.kept + self.draft
        return held + self.buffers + self.kv_cache + self.activations + self.slots

    @property
    def spare(self) -> int:
        """Bytes of the limit that stay free; negative when the plan does not fit."""
        return self.limit - self.planned


@dataclass(frozen=True)
class Forecast:
    """Predicted speed, from bytes moved and measured bandwidths.

    Attributes
    ----------
    decode_tps, prefill_tps
        Tokens per second; 0 when a needed bandwidth is unknown.
    bound_by
        The tier that takes the most time, as people say it (``"disk, 0.8 GB/s"``).
    bytes_per_token
        ``(source, target) -> bytes`` that move or are read for one sweep that decodes one token.
    limit_tps
        Decode rate at the hardware's limit: these bytes at the measured bandwidths, layers one after
        the other without launches, every copy hidden behind them, one token a sweep. 0 when a
        bandwidth is unknown.
    """

    decode_tps: float
    prefill_tps: float
    bound_by: str
    bytes_per_token: Mapping[tuple[str, str], int]
    limit_tps: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A checked placement of a model on a machine.

    ``policy`` is the planner's name or the file that the map came from; ``problems`` says why it
    does not fit, in sentences, and is empty when it does; ``remedies`` says what would fit.
    ``mapped`` says that the CPU uses blocks on disk right in the system's page cache, which has
    room for all of them. ``long_sweep`` is the number of tokens, of all sequences together, from
    which on blocks with a ``prefill`` device compute there; 0 without such blocks. ``constants`` is what
    the forecast assumes of the machine, by name, for plans that are made of this one.
    """

    source: str
    layout: ModelLayout
    machine: Machine
    workload: Workload
    budget: MemoryBudget
    policy: str
    placements: tuple[Placement, ...]
    uses: tuple[DeviceUse, ...]
    forecast: Forecast
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False
    long_sweep: int = 0
    constants: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        fits = "fits" if self.fits else "does not fit"
        return f"<Plan of {self.layout.name} by {self.policy}: {fits}>"

    @property
    def fits(self) -> bool:
        """Whether every device has room for what is planned on it."""
        return not self.problems

    @cached_property
    def device_map(self) -> dict[str, str]:
        """Block name -> device name, in model order."""
        return {placement.block.name: placement.home for placement in self.placements}

    @cached_property
    def offloaded(self) -> tuple[Placement, ...]:
        """Placements whose weights travel."""
        return tuple(p for p in self.placements if p.is_offloaded)

    def use(self, device: str) -> DeviceUse:
        """Bytes by purpose of one device.

        Raises
        ------
        KeyError
            When the plan does not know the device.
        """
        for use in self.uses:
            if use.device == device:
                return use
        raise KeyError(device)


@dataclass(frozen=True, kw_only=True)
class PlannedEvent(PhaseEvent):
    """The phase begins, and where blocks will be is known now."""

    plan: Plan
