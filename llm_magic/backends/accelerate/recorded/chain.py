"""Compiled functions, products, attention, and kernels that change states, of a recorded layer, that come one after the
other: one call for all of them.

Each is a kernel that is told by words where everything is. The words of all of them lie in one array, in which only those
change that somebody else decides: where weights are, what a chain gets, and what it makes for others. What is made and
used inside has room that all layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.cpu_attention import leave_room, taken_room
from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights, Products
from llm_magic.backends.accelerate.kernels.in_turn import in_turn
from llm_magic.backends.accelerate.kernels.steps import Loop, Operand
from llm_magic.backends.accelerate.kernels.words import (
    ADDRESSES,
    ARRANGED,
    HEAD_WORDS,
    MATRICES,
    RESULTS,
    TEAM,
    TOKENS,
)
from llm_magic.backends.accelerate.preparation import preparing
from llm_magic.backends.accelerate.recorded.attending import Attention, Told
from llm_magic.backends.accelerate.recorded.linears import Linears
from llm_magic.backends.accelerate.recorded.picks import Largest, Pick
from llm_magic.backends.accelerate.recorded.plan import Plan, Words
from llm_magic.backends.accelerate.recorded.program import CompiledRegion, Values
from llm_magic.backends.accelerate.recorded.recording import View
from llm_magic.backends.accelerate.recorded.states import StateStep

Member = CompiledRegion | Linears | StateStep | Attention | Pick | Largest

_MOST_KEPT = 4
"""Arrays of words that a chain keeps: threads that run a layer at the same time."""


class Room:
    """Memory for what chains use inside, which all layers share: one has it at a time, and others get some of their own."""

    def __init__(self) -> None:
        self._left: list[Any] = []

    def take(self, size: int) -> Any:
        """At least so many bytes."""
        import torch

        try:
            room = self._left.pop()
        except IndexError:
            room = None
        if room is None or room.nbytes < size:
            room = torch.empty(size, dtype=torch.uint8, device="cpu")
        return room

    def leave(self, room: Any) -> None:
        """Give it back."""
        if len(self._left) < _MOST_KEPT:
            self._left.append(room)


def chained(
    steps: Sequence[Any], wanted: Sequence[set[int]], room: Room, *, joins_attention: bool = True
) -> list[Any]:
    """Steps with chains in the place of those that are one.

    Parameters
    ----------
    steps
        Members of chains, and functions of values.
    wanted
        For each step the bases that it reads, and for what is behind the last one those of the result.
    joins_attention
        Whether attention is a member, too.
    """
    found: list[Any] = []
    start = 0
    while start < len(steps):
        end = start
        may_attend = joins_attention
        while end < len(steps) and _may_be_in_one(steps[end], joins_attention=may_attend):
            may_attend = may_attend and not isinstance(
                steps[end], Attention
            )  # the second looks at what the first has done
            end += 1
        if end - start > 1:
            outside = set[int]().union(*wanted[end:])
            some, reads = steps[start:end], [*wanted[start:end], outside]
            has_attention = any(isinstance(step, Attention) for step in some)
            rest = chained(some, reads, room, joins_attention=False) if has_attention else ()
            found.append(Chain(some, outside, room, rest).run)
        else:
            end = start + 1
            found.append(getattr(steps[start], "run", steps[start]))
        start = end
    return found


def _may_be_in_one(step: Any, *, joins_attention: bool) -> bool:
    if isinstance(step, Linears):
        return step.may_be_chained
    return isinstance(step, CompiledRegion | StateStep | Pick | Largest) or (
        joins_attention and isinstance(step, Attention)
    )


class Weighed(NamedTuple):
    """What linear layers multiply with.

    Attributes
    ----------
    weights, biases
        Of each of them that has some.
    products
        Of each group of them.
    have_bias
        Which of them have one.
    bytes
        That are read of all of them.
    """

    weights: list[PackedWeights]
    biases: list[Any]
    products: list[Products]
    have_bias: list[bool]
    bytes: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What words depend on, while products are there."""
        return *map(id, self.products), *self.have_bias


class Chain:
    """Some members, in one call.

    Parameters
    ----------
    members
        In their order.
    outside
        Bases that others read.
    rest
        What computes the same where attention is no case for its kernel.

    Attributes
    ----------
    attention
        That among them; ``None``: there is none.
    linears
        Linear layers, routers and experts among them, in their order.
    has_states
        Whether they change states where these are.
    """

    def __init__(
        self, members: Sequence[Member], outside: set[int], room: Room, rest: Sequence[Any] = ()
    ) -> None:
        self._members, self._outside, self._room, self._rest = list(members), outside, room, rest
        self.attention = next((member for member in members if isinstance(member, Attention)), None)
        self.linears = [member for member in members if isinstance(member, Linears)]
        self.has_states = any(isinstance(member, StateStep) for member in members)
        self._kept: dict[tuple[Any, ...], tuple[list[Products], list[Words]]] = {}
        with preparing():
            in_turn()

    def run(self, values: Values) -> None:
        """Put into ``values`` what they make that others read."""
        weighed = self.weighed()
        if weighed is None:
            for member in self._members:
                member.run(values)
            return
        told = None
        if self.attention is not None:
            case = self.attention.case(values)
            told = None if case is None else self.attention.told(case)
            if told is None:
                for step in self._rest:
                    step(values)
                return
        kept = self._kept.setdefault((*weighed.key, told and told.key), (weighed.products, []))[1]
        try:
            words = kept.pop()  # nobody else has it then
        except IndexError:
            words = self.words(weighed, told)
        self.make(weighed, told, values)
        room = self._room.take(words.size)
        words.tell(values, room.data_ptr())
        words.tell_weights(weighed.weights, weighed.biases)
        if self.attention is None or told is None:
            in_turn()(words.array)
        else:
            records = taken_room(told.call.room)
            self.attention.tell(words.array, words.attention, told, records)
            in_turn()(words.array)
            self.attention.keep(told)
            leave_room(records)
        self._room.leave(room)
        if len(kept) < _MOST_KEPT:
            kept.append(words)

    def weighed(self) -> Weighed | None:
        """What its linear layers multiply with now; ``None`` where some do not by kernels."""
        weights: list[PackedWeights] = []
        biases: list[Any] = []
        products: list[Products] = []
        size = 0
        for linears in self.linears:
            found, added = linears.weights(), linears.biases()
            some = None if found is None else linears.prepared(found)
            if found is None or added is None or some is None:
                return None
            weights += found
            biases += added
            products.append(some)
            size += some.bytes_of(found[0].kind)
        have_bias = [bias is not None for bias in biases]
        return Weighed(weights, [bias for bias in biases if bias is not None], products, have_bias, size)

    def words(self, weighed: Weighed, told: Told | None) -> Words:
        """Words of their own."""
        with preparing():
            return _planned(self._members, (weighed.products, told), weighed.have_bias, self._outside)

    def make(self, weighed: Weighed, told: Told | None, values: Values) -> None:
        """Memory for what others read."""
        import torch

        if self.attention is not None and told is not None:
            for view, held in zip(self.attention.all, (told.keys, told.values), strict=True):
                if view.base in self._outside:
                    values[view.base] = held
        each = iter(weighed.products)
        for member in self._members:
            if not isinstance(member, Linears):
                for view in member.made:
                    if view.base in self._outside:
                        values[view.base] = torch.empty_strided(
                            view.shape, view.stride, dtype=view.dtype, device="cpu"
                        )
                continue
            places = next(each).places
            for out in member.outputs:
                if out.base in self._outside:
                    rows = torch.empty(places, out.shape[-1], dtype=member.dtype, device="cpu")
                    values[out.base] = rows[: member.tokens].view(out.shape)


def _planned(
    members: Sequence[Member],
    told: tuple[Sequence[Products], Told | None],
    have_bias: Sequence[bool],
    outside: set[int],
) -> Words:
    """Where each word of a chain comes from."""
    products, attends = told
    count = len(members) + sum(have_bias)
    count += sum(member.kernels - 1 for member in members if isinstance(member, Attention))
    plan, each, has_bias = Plan(count, outside), iter(products), iter(have_bias)
    for member in members:
        if isinstance(member, CompiledRegion):
            _add_region(plan, member)
        elif isinstance(member, StateStep):
            _add_step(plan, member)
        elif isinstance(member, Pick | Largest):
            member.add(plan)
        elif isinstance(member, Attention):
            assert attends is not None
            plan.attention = member.add(plan, attends)
        else:
            _add_linears(plan, member, next(each))
            for out in member.outputs:
                if next(has_bias):
                    _add_bias(plan, out, member.tokens)
    return plan.words


def _add_region(plan: Plan, region: CompiledRegion) -> None:
    for view in region.made:
        plan.place(view)
    first = plan.begin(region.kernel, [0] * (len(region.outer) + len(region.offsets)))
    for number, base in enumerate(region.outer):
        plan.point(first + number, base)
    scratch = plan.take(region.scratch_bytes)
    for number, offset in enumerate(region.offsets):
        plan.point_inside(first + len(region.outer) + number, scratch + offset)


def _add_step(plan: Plan, step: StateStep) -> None:
    kernel, (out,) = step.kernel, step.made
    plan.place(out)
    told = [0] * (len(step.parts) + 1) + list(kernel.counts)
    first = plan.begin(kernel.run, [*told, 0, kernel.shares])
    for number, view in enumerate((*step.parts, out)):
        if view is not None:
            plan.point_at(first + number, view)
    if kernel.shares > 1:
        plan.have_team(first + len(told))


def _add_linears(plan: Plan, linears: Linears, products: Products) -> None:
    first = plan.begin(products.kernel, products.words(0, 0, [0] * ADDRESSES * len(linears.outputs)))
    plan.point_at(first + TOKENS, linears.tokens_view)
    if linears.matrices is not None:
        plan.point_at(first + MATRICES, linears.matrices)
    if products.room:
        plan.point_inside(first + ARRANGED, plan.take(products.room))
    if products.shares > 1:
        plan.have_team(first + TEAM)
    for number, out in enumerate(linears.outputs):
        addresses = first + HEAD_WORDS + ADDRESSES * number
        plan.weights.append(addresses)
        plan.place(out, products.places * out.shape[-1] * out.dtype.itemsize)
        plan.point(addresses + RESULTS, out.base)


def _add_bias(plan: Plan, out: View, tokens: int) -> None:
    first = plan.begin(_added(tokens, out.shape[-1], str(out.dtype).removeprefix("torch.")), [0, 0])
    plan.point(first, out.base)
    plan.biases.append(first + 1)


@cache
def _added(tokens: int, rows: int, dtype: str) -> Any:
    """The kernel that adds a bias to results, in place, which are rounded before that as well."""
    from llm_magic.backends.accelerate.kernels.elementwise import elementwise

    results, bias = Operand(0, 0, (rows, 1), dtype), Operand(1, 0, (0, 1), dtype)
    return elementwise((Loop("add", (), (tokens, rows), results, (results, bias)),))
