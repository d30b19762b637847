"""Projections of one input as one matrix: q, k and v of an attention, gate and up of an MLP.

For a few tokens a matrix product is bound by reading its weights, and one large matrix is read faster than
three small ones. The weights of a group are laid one behind the other in one buffer, unless they lie so already,
and the parameters become views of it: names, ``state_dict`` and bytes stay what they were. The first projection of a group
computes all of them, the others hand out their part, so a model's own code runs as it is.

A prefill, which computes many tokens at once, takes the single matrices: it gains nothing from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

from llm_magic.backends.accelerate.memory_errors import is_out_of_memory
from llm_magic.backends.accelerate.served.cpu_linear import is_linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FEW_TOKENS = 16


class JoinedGroup:
    """Linear modules that see the same input.

    Parameters
    ----------
    modules
        In the order in which their module calls them; another order is right, but gains nothing.
    weight, bias
        ``[sum of outputs, inputs]`` and ``[sum of outputs]`` or ``None``.
    is_rebound
        Whether the modules' own weights were laid elsewhere for it.
    """

    def __init__(self, modules: Sequence[Any], weight: Any, bias: Any, *, is_rebound: bool) -> None:
        self.weight, self.bias = weight, bias
        self._is_rebound = is_rebound
        self.widths = [module.out_features for module in modules]
        self.last = len(modules) - 1
        self.input: Any = None
        self.parts: tuple[Any, ...] = ()
        self._modules = tuple(modules)
        for place, module in enumerate(modules):
            # One function for all layers, with the state beside it: compiled once, it serves them all.
            module.joined_group, module.joined_place = self, place
            module.forward = MethodType(_joined_forward, module)

    def undo(self) -> None:
        """Let every module work by itself, with weights of its own."""
        for module in self._modules:
            del module.forward, module.joined_group, module.joined_place
            if self._is_rebound:
                _lay_alone(module.weight)
        self._modules = ()


def _joined_forward(module: Any, states: Any) -> Any:
    """The forward of a module in a group: its own part of what the first one has computed for all."""
    import torch

    group, place = module.joined_group, module.joined_place
    if states.shape[-2] <= FEW_TOKENS:
        if place == 0:
            product: Any = torch.nn.functional.linear(states, group.weight, group.bias)
            group.parts = product.split(group.widths, dim=-1)
            group.input = states
            return group.parts[0]
        if group.input is states:
            part = group.parts[place]
            if place == group.last:
                group.input, group.parts = None, ()
            return part
    return torch.nn.functional.linear(states, module.weight, module.bias)


class JoinedProjections:
    """All groups that can be joined in some blocks.

    Parameters
    ----------
    blocks
        Modules whose weights stay where they are until ``undo``.
    """

    def __init__(self, blocks: Iterable[Any]) -> None:
        self._groups: list[JoinedGroup] = []
        try:
            for block in blocks:
                for members in _groups(block):
                    group = _join(members)
                    if group is not None:
                        self._groups.append(group)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # the rest of the projections can do without

    def __len__(self) -> int:
        return len(self._groups)

    def undo(self) -> None:
        """Before a block moves, or another library takes it: everything as it was."""
        while self._groups:
            self._groups.pop().undo()


def _lay_alone(weight: Any) -> None:
    """Give a weight memory of its own; without room for that it stays a view, which is as right."""
    try:
        weight.data = weight.data.clone()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def _groups(block: Any) -> Iterator[list[Any]]:
    for module in block.modules():
        for names in GROUPS:
            members = [getattr(module, name, None) for name in names]
            if all(_is_plain(member) for member in members):
                yield members


def _is_plain(module: Any) -> bool:
    return (
        is_linear(module)
        and "forward" not in vars(module)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and module.weight.device.type != "meta"
    )


def _join(modules: Sequence[Any]) -> JoinedGroup | None:
    import torch

    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    kinds = {(w.dtype, w.device, w.shape[1], w.requires_grad) for w in weights}
    if len(kinds) > 1 or len(biases) not in (0, len(modules)) or len(set(map(id, weights))) < len(weights):
        return None
    with torch.no_grad():
        bias = torch.cat(biases) if biases else None  # a few bytes, held twice
        if _are_adjacent(weights):
            return JoinedGroup(modules, _spanning(weights), bias, is_rebound=False)
        if all(_is_whole(weight) for weight in weights):
            return JoinedGroup(modules, _laid_together(weights), bias, is_rebound=True)
    return None


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is alone in its memory: one that was cut out of more would keep all of that alive."""
    return bool(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes)


def _are_adjacent(weights: Sequence[Any]) -> bool:
    """Whether they lie one behind the other, as in a block's flat buffer."""
    memory = weights[0].untyped_storage().data_ptr()
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    return all(
        weight.is_contiguous() and weight.untyped_storage().data_ptr() == memory for weight in weights
    ) and all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))


def _spanning(weights: Sequence[Any]) -> Any:
    first = weights[0].data
    return first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), first.stride())


def _laid_together(weights: Sequence[Any]) -> Any:
    """Put weights into one tensor, of which they are views from then on."""
    import torch

    joined = torch.cat([weight.data for weight in weights])
    at = 0
    for weight in weights:
        weight.data = joined[at : at + weight.shape[0]]
        at += weight.shape[0]
    return joined
