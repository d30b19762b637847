"""Projections of one input as one matrix: q, k and v of an attention, gate and up of an MLP.

For a few tokens a matrix product is bound by reading its weights, and one large matrix is read faster than
three small ones. The weights of a group are laid one behind the other in one buffer, and the parameters
become views of it: names, ``state_dict`` and bytes stay what they were. The first projection of a group
computes all of them, the others hand out their part, so a model's own code runs as it is.

A prefill, which computes many tokens at once, takes the single matrices: it gains nothing from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

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
    """

    def __init__(self, modules: Sequence[Any], weight: Any, bias: Any) -> None:
        self.weight, self.bias = weight, bias
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
            for parameter in module.parameters(recurse=False):
                if not _is_whole(parameter):
                    parameter.data = parameter.data.clone()
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
        for block in blocks:
            for members in _groups(block):
                group = _join(members)
                if group is not None:
                    self._groups.append(group)

    def __len__(self) -> int:
        return len(self._groups)

    def undo(self) -> None:
        """Before a block moves, or another library takes it: everything as it was."""
        while self._groups:
            self._groups.pop().undo()


def _groups(block: Any) -> Iterator[list[Any]]:
    for module in block.modules():
        for names in GROUPS:
            members = [getattr(module, name, None) for name in names]
            if all(_is_plain(member) for member in members):
                yield members


def _is_plain(module: Any) -> bool:
    import torch

    return (
        type(module) is torch.nn.Linear
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
    if len(kinds) > 1 or len(biases) not in (0, len(modules)):
        return None
    if any(not _is_whole(tensor) for tensor in (*weights, *biases)) or len(set(map(id, weights))) < len(
        weights
    ):
        return None
    with torch.no_grad():
        return JoinedGroup(modules, _one_behind_the_other(weights), _one_behind_the_other(biases))


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is alone in its memory: a view of a larger one would keep all of that alive."""
    return bool(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes)


def _one_behind_the_other(parameters: Sequence[Any]) -> Any:
    """Put parameters into one tensor, of which they are views from then on."""
    import torch

    if not parameters:
        return None
    joined = torch.cat([parameter.data for parameter in parameters])
    at = 0
    for parameter in parameters:
        parameter.data = joined[at : at + parameter.shape[0]]
        at += parameter.shape[0]
    return joined
