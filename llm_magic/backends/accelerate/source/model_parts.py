"""How a model is cut: into which parts, in the order in which they run, and whose each parameter is.

A part is placed as a whole. Layers are parts, and so is everything around them that holds no layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llm_magic.backends.accelerate.architecture import beside_the_text, decoder_of

LAST_NORM = re.compile(r"final|ln_f|norm_f|^norm$", re.IGNORECASE)
"""What the norm after the layers is called."""


@dataclass
class Part:
    """A module (or a bare parameter) on its way to become a block."""

    name: str
    module: Any
    layer: int | None = None
    tensors: tuple[tuple[str, Any], ...] = ()
    buffer_bytes: int = 0
    is_idle: bool = False


def parts_of(model: Any) -> list[Part]:
    """The parts in the order in which they run; at the end those that work beside the text, which are idle."""
    idle = beside_the_text(model)
    text = decoder_of(model) if idle else model
    layers = _layers_of(text, frozenset(model._no_split_modules or ()))
    cut = [replace(part, is_idle=id(part.module) in idle) for part in _cut(model, "", layers)]
    in_use = [part for part in cut if not part.is_idle]
    return [*_in_order(in_use), *(part for part in cut if part.is_idle)]


def _layers_of(model: Any, classes: frozenset[str]) -> dict[int, int]:
    """``id(module) -> number`` of every encoder or decoder layer, outermost modules only."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [stack for stack in lists if all(type(layer).__name__ in classes for layer in stack)]
    if not stacks:  # a model that names no layers: its longest list is the stack
        stacks = sorted(lists, key=len)[-1:]
    layers = {id(layer): number for stack in stacks for number, layer in enumerate(stack)}
    inner = {id(m) for stack in stacks for layer in stack for m in layer.modules() if m is not layer}
    return {module: number for module, number in layers.items() if module not in inner}


def _cut(module: Any, name: str, layers: dict[int, int]) -> Iterator[Part]:
    """The parts of a module in the order of its children: layers and layerless modules stay whole.

    Nobody calls a list of modules: each of them gets its inputs by itself.
    """
    from torch import nn

    is_called = type(module).forward is not nn.Module.forward
    holds_layers = any(id(inner) in layers for inner in module.modules())
    if id(module) in layers or (name and is_called and not holds_layers):
        tensors = tuple((f"{name}.{n}", p) for n, p in module.named_parameters(remove_duplicate=False))
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        if tensors or buffers:
            yield Part(name, module, layers.get(id(module)), tensors, buffers)
        return
    for key, parameter in module.named_parameters(recurse=False):
        yield Part(_join(name, key), parameter, None, ((_join(name, key), parameter),))
    for key, buffer in module.named_buffers(recurse=False):
        yield Part(_join(name, key), buffer, None, (), buffer.nbytes)
    for key, child in module.named_children():
        yield from _cut(child, _join(name, key), layers)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _in_order(parts: list[Part]) -> list[Part]:
    """Parts in the order in which they run, where that is not the order of registration.

    Within the module that holds a stack of layers, what has no weights (rotary tables) runs
    before the layers, and the last norm after them.
    """
    for stack in {
        part.name.rpartition(".")[0].rpartition(".")[0] for part in parts if part.layer is not None
    }:
        inside = [i for i, part in enumerate(parts) if not stack or part.name.startswith(f"{stack}.")]
        first = min(i for i in inside if parts[i].layer is not None)
        ranked = sorted(inside, key=lambda i: (_phase(parts[i], before=i < first), i))
        moved = [parts[i] for i in ranked]
        for i, part in zip(inside, moved, strict=True):
            parts[i] = part
    return parts


def _phase(part: Part, *, before: bool) -> int:
    if part.layer is not None:
        return 1
    if not part.tensors:
        return 0
    last = part.name.rpartition(".")[2]
    return 0 if before and not LAST_NORM.search(last) else 2


def share_out(parts: list[Part]) -> tuple[dict[str, list[tuple[str, Any]]], dict[str, tuple[str, ...]]]:
    """Each parameter to the first part that holds it, and for each part the others that share with it."""
    owners: dict[int, list[str]] = {}
    own: dict[str, list[tuple[str, Any]]] = {part.name: [] for part in parts}
    for part in parts:
        for name, parameter in part.tensors:
            holders = owners.setdefault(id(parameter), [])
            if not holders:
                own[part.name].append((name, parameter))
            if part.name not in holders:
                holders.append(part.name)
    ties: dict[str, tuple[str, ...]] = {part.name: () for part in parts}
    for holders in owners.values():
        for name in holders if len(holders) > 1 else ():
            ties[name] = tuple(dict.fromkeys((*ties[name], *(h for h in holders if h != name))))
    return own, ties
