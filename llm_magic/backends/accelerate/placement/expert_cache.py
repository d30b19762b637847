"""The experts that a device holds: a set of hot ones, and those that the tokens of this pass ask for.

The router says which experts a pass needs before the first one computes. All that are missing start
at once, in the order of their use, as far as there are slots; each slot that was used makes room for
the next. What is used least gives way: every token counts for its experts, and counts fade as tokens
pass, so that the set follows the topic. A long prompt needs nearly all experts of a layer; then those of the next layer
come, too, before its router has chosen: the bus would stand still while attention computes.

Slots are tagged, and a slot that a pass still needs is never given away, so a pass that failed or was
interrupted costs at worst some fetches.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.placement.expert_stores import ExpertStore
    from llm_magic.backends.accelerate.placement.stream import Arrival, Mark, Streams, Watch

_HALF_LIFE_TOKENS = 256  # a use counts half after as many tokens: some paragraphs
NEARLY_ALL = 0.9  # of a layer's experts, where the next layer will need as many


class ExpertLayer:
    """The experts of one layer, and how often each of them was asked for.

    Parameters
    ----------
    store
        Where they stay.

    Attributes
    ----------
    tokens
        How many have passed.
    heat
        For each expert, log2 of its faded uses plus ``tokens`` in half-lives. Fading takes the same
        from all of them, so that heats of any time and layer compare.
    """

    def __init__(self, store: ExpertStore) -> None:
        import numpy

        self.store = store
        self.tokens = 0
        self.heat = numpy.full(store.experts, -math.inf)

    def count(self, uses: Mapping[int, int], tokens: int) -> None:
        """``tokens`` more have passed, and used experts as often as ``uses`` says."""
        import numpy

        self.tokens += tokens
        now = self.tokens / _HALF_LIFE_TOKENS
        for index, count in uses.items():
            self.heat[index] = numpy.logaddexp2(self.heat[index], math.log2(count) + now)


@dataclass(eq=False)
class _Slot:
    """Room for one expert.

    ``users`` counts the passes that need it now; ``has_come`` says its bytes are there; ``is_expected`` that a pass will
    need it soon.
    """

    number: int
    memory: Any
    tag: tuple[ExpertLayer, int] | None = None
    arrival: Arrival | None = None
    has_come: bool = False
    is_expected: bool = False
    used: Mark | None = None
    users: int = 0
    views: tuple[Any, ...] = ()


@dataclass(eq=False)
class _Pass:
    """One layer's experts at work on one thread: those that it holds, those still to be fetched, and what comes next."""

    layer: ExpertLayer
    following: ExpertLayer
    expected: list[int]
    held: dict[int, _Slot] = field(default_factory=dict)
    wanted: list[int] = field(default_factory=list)
    current: int | None = None


class ExpertCache:
    """Slots for the experts of all layers that compute on one device.

    Parameters
    ----------
    memory
        All slots in one piece (uint8, on the device).
    slot_bytes
        Room for the largest expert.
    streams
        The device's order of copies and computation.

    Attributes
    ----------
    device
        Where the slots are.
    slots
        How many experts fit.
    hits, misses
        Experts that a pass needed and that were there, or were not, if on their way.
    fetched_bytes
        What came to the device, evicted experts that were asked for again included.
    watch
        Is told of every wait for an expert, while somebody measures; ``None``: nobody does.

    Raises
    ------
    ValueError
        When not even one expert fits.
    """

    def __init__(self, memory: Any, slot_bytes: int, streams: Streams) -> None:
        import numpy

        self.slots = memory.numel() // slot_bytes
        if not self.slots:
            raise ValueError(f"no room for an expert of {slot_bytes} bytes in {memory.numel()}")
        self.slot_bytes = slot_bytes
        self.device = memory.device
        self.hits = self.misses = self.fetched_bytes = 0
        self.watch: Watch | None = None
        self._streams = streams
        now = streams.mark()  # what had this memory before may be at work on it still
        self._slots = [
            _Slot(number, memory[number * slot_bytes : (number + 1) * slot_bytes], used=now)
            for number in range(self.slots)
        ]
        self._held: dict[tuple[ExpertLayer, int], _Slot] = {}
        # How hot what a slot holds is; +inf while it is needed.
        self._heat = numpy.full(self.slots, -math.inf)
        self._passes: dict[int, _Pass] = {}
        self._changed = threading.Condition()

    def begin(
        self,
        layer: ExpertLayer,
        uses: Mapping[int, int],
        tokens: int,
        following: ExpertLayer | None = None,
    ) -> None:
        """A pass of ``tokens`` tokens will use these experts (index -> how often), in ascending order.

        Those that are missing start to come, and if that are nearly all, then those of the layer that follows.
        """
        with self._changed:
            self._drop_own()
            layer.count(uses, tokens)
            is_long = following is not None and len(uses) >= NEARLY_ALL * layer.store.experts
            next_layer = following or layer
            expected = list(range(next_layer.store.experts)) if is_long and next_layer is not layer else []
            work = self._passes[threading.get_ident()] = _Pass(layer, next_layer, expected)
            for index in sorted(uses):
                slot = self._held.get((layer, index))
                if slot is None:
                    work.wanted.append(index)
                else:
                    self._hold(work, index, slot)
            there = sum(slot.has_come for slot in work.held.values())
            self.hits += there
            self.misses += len(uses) - there
            self._drop_expected()
            self._fetch_ahead(work)

    def count(self, layer: ExpertLayer, uses: Mapping[int, int], tokens: int) -> None:
        """A pass of ``tokens`` tokens uses these experts, and gets them in another way."""
        with self._changed:
            layer.count(uses, tokens)

    def take(self, index: int) -> tuple[Any, ...]:
        """The tensors of one expert of this thread's pass. They are its own until another one is taken, or the pass ends.

        Raises
        ------
        BaseException
            What went wrong with its transfer; a later pass tries it anew.
        """
        with self._changed:
            work = self._passes[threading.get_ident()]
            if work.current != index:
                self._release_current(work)
                self._arrive(work, index)
                work.current = index
            return work.held[index].views

    def end(self) -> None:
        """The pass of this thread is over."""
        with self._changed:
            self._drop_own()

    def settle(self) -> None:
        """After passes that did not end, on any thread: nobody needs their slots any more."""
        with self._changed:
            for thread in list(self._passes):
                self._drop(self._passes.pop(thread))
            self._drop_expected()

    def forget(self, layer: ExpertLayer) -> None:
        """The layer's experts will not be asked for again: their slots are the first to be given away."""
        with self._changed:
            for slot in self._slots:
                if slot.tag and slot.tag[0] is layer:
                    self._untag(slot)

    def close(self) -> None:
        """Wait for what is on its way, and let the slots go: nothing is copied any more when it returns."""
        with self._changed:
            self._passes.clear()
            self._held.clear()
            for slot in self._slots:
                _settled(slot)
            if self._slots:
                self._streams.join()
                self._streams.mark().synchronize()
            self._slots.clear()

    # Inside; the lock is held

    def _arrive(self, work: _Pass, index: int) -> None:
        """Have an expert there, and those that come next on their way."""
        slot = work.held.get(index)
        watch = None if slot is not None and slot.has_come else self.watch
        if watch is not None:
            watch.stands_still()
        slot = slot or self._bring(work, index)
        self._fetch_ahead(work)
        _arrived(slot)
        if watch is not None:
            watch.goes_on(slot.arrival)

    def _fetch_ahead(self, work: _Pass) -> None:
        while work.wanted:
            slot = self._coldest()
            if slot is None:
                return
            self._fill(slot, work, work.wanted.pop(0))
        self._expect(work)

    def _expect(self, work: _Pass) -> None:
        """Bring experts of the next layer to slots that nobody needs."""
        while work.expected:
            slot = self._coldest()
            if slot is None:
                return
            index = work.expected.pop(0)
            if (work.following, index) not in self._held:
                with suppress(Exception):  # its own pass tries again, and raises where somebody can act on it
                    self._start(slot, work.following, index)
                    slot.is_expected, self._heat[slot.number] = True, math.inf

    def _drop_expected(self) -> None:
        """What was expected and is not needed makes room."""
        for slot in self._slots:
            if slot.is_expected and not slot.users:
                self._untag(slot)

    def _bring(self, work: _Pass, index: int) -> _Slot:
        """Fetch what is needed right now, whatever it takes."""
        if index in work.wanted:
            work.wanted.remove(index)
        while (slot := self._coldest()) is None:
            if any(slot.is_expected for slot in self._slots):
                self._drop_expected()
            elif work.held:
                self._give_back_last(work)
            else:
                self._changed.wait()  # other threads need all of them now
        self._fill(slot, work, index)
        return slot

    def _give_back_last(self, work: _Pass) -> None:
        """Part with the expert that this pass needs last, to have it fetched again."""
        index = max(work.held)
        self._leave(work, index)
        bisect.insort(work.wanted, index)

    def _coldest(self) -> _Slot | None:
        number = int(self._heat.argmin())
        return None if self._heat[number] == math.inf else self._slots[number]

    def _fill(self, slot: _Slot, work: _Pass, index: int) -> None:
        self._start(slot, work.layer, index)
        self._hold(work, index, slot)

    def _start(self, slot: _Slot, layer: ExpertLayer, index: int) -> None:
        self._untag(slot)
        _settled(slot)
        slot.arrival = None
        slot.arrival = layer.store.source(index).start(slot.memory, slot.used)
        slot.views = layer.store.views(index, slot.memory)
        slot.tag = (layer, index)
        self._held[slot.tag] = slot
        self.fetched_bytes += layer.store.expert_bytes

    def _hold(self, work: _Pass, index: int, slot: _Slot) -> None:
        slot.users += 1
        slot.is_expected = False
        work.held[index] = slot
        self._heat[slot.number] = math.inf

    def _release_current(self, work: _Pass) -> None:
        if work.current is not None:
            current, work.current = work.current, None
            self._leave(work, current)

    def _leave(self, work: _Pass, index: int) -> None:
        slot = work.held.pop(index)
        slot.used = self._streams.mark()
        slot.users -= 1
        if not slot.users:
            if not slot.has_come:
                self._untag(slot)  # nobody has seen whether it came well
            else:
                self._heat[slot.number] = work.layer.heat[index]
            self._changed.notify_all()

    def _drop_own(self) -> None:
        work = self._passes.pop(threading.get_ident(), None)
        if work is not None:
            self._drop(work)

    def _drop(self, work: _Pass) -> None:
        work.current = None
        for index in list(work.held):
            self._leave(work, index)

    def _untag(self, slot: _Slot) -> None:
        if slot.tag is not None:
            self._held.pop(slot.tag, None)
        slot.tag, slot.has_come, slot.is_expected, slot.views = None, False, False, ()
        self._heat[slot.number] = math.inf if slot.users else -math.inf


def _arrived(slot: _Slot) -> None:
    assert slot.arrival is not None  # a slot that is held was filled
    slot.arrival.wait()
    slot.has_come = True


def _settled(slot: _Slot) -> None:
    if slot.arrival is not None:
        slot.arrival.settle()
