"""Accelerate's hooks on the blocks of a placed model: at most one on each.

A block whose weights travel has a `StreamHook`; where several devices compute, the others have an
`InputHook`, which brings their inputs. Modules inside of blocks have none.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device

from llm_magic.backends.accelerate.packed.templates import bind
from llm_magic.backends.accelerate.placement.blocks import Binding, BlockTensors
from llm_magic.backends.accelerate.placement.stream import Lane


class StreamHook(AlignDevicesHook):  # type: ignore[misc]  # accelerate has no types
    """A lane brings the block's weights before its forward pass, and has the slot back after it.

    Parameters
    ----------
    tensors
        The block's parameters.
    weights_map
        The same by name, from where they stay: ``save_pretrained`` and adapters ask for them.
    lane, index
        What brings the block, and its number there.
    bindings
        For each slot of the lane, what puts the slot's views into the block.
    execution_device
        Where the block computes.
    align
        Whether its inputs may come from another device.
    skip_keys
        Arguments that stay where they are (the KV cache).

    Attributes
    ----------
    slot
        Number of the slot that the block was shown last.
    """

    def __init__(
        self,
        tensors: BlockTensors,
        weights_map: Mapping[str, Any],
        lane: Lane,
        index: int,
        bindings: Sequence[Binding],
        *,
        execution_device: Any,
        align: bool,
        skip_keys: Any = None,
    ) -> None:
        super().__init__(
            execution_device=execution_device,
            offload=True,
            weights_map=weights_map,
            place_submodules=True,
            skip_keys=skip_keys,
        )
        self.original_devices: dict[str, Any] = {}
        self._tensors, self._lane, self._index, self._bindings = tensors, lane, index, bindings
        self._align = align
        self.slot = 0
        self._users = 0
        self._lock = threading.Lock()

    def init_hook(self, module: Any) -> Any:
        """Nothing moves before the first forward pass."""
        return module

    def pre_forward(self, _module: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait for the weights, and show them to the block's modules."""
        self.slot = slot = self._lane.take(self._index)
        with self._lock:
            self._users += 1
            bind(self._bindings[slot])
        if not self._align:
            return args, kwargs
        moved = send_to_device(args, self.execution_device)
        return moved, send_to_device(kwargs, self.execution_device, skip_keys=self.skip_keys)

    def post_forward(self, _module: Any, output: Any) -> Any:
        """Leave tensors without bytes in the modules, and the slot to the next block."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._tensors.clear()
        self._lane.release(self._index)
        return output

    def detach_hook(self, module: Any) -> Any:
        """The block's store keeps the weights."""
        return module

    def settle(self) -> None:
        """After a forward pass that did not end."""
        with self._lock:
            self._users = 0
            self._tensors.clear()


class InputHook(AlignDevicesHook):  # type: ignore[misc]  # accelerate has no types
    """Inputs follow a module to its device; weights stay as they are, where Accelerate would make them anew."""

    def init_hook(self, module: Any) -> Any:
        """Every weight is where it belongs."""
        return module


def attach(module: Any, hook: AlignDevicesHook) -> None:
    """Put a hook on a module, in place of the one that it has."""
    add_hook_to_module(module, hook)


def align_inputs(module: Any, device: Any, skip_keys: Any) -> None:
    """Let a module's inputs follow it to ``device``."""
    add_hook_to_module(module, InputHook(device, skip_keys=skip_keys))


def align_both_ways(module: Any, device: Any, skip_keys: Any) -> None:
    """Bring a module's inputs to ``device``, and its outputs back to where the inputs came from."""
    add_hook_to_module(module, InputHook(device, io_same_device=True, skip_keys=skip_keys))


def detach(module: Any) -> None:
    """Take the hook off a block or a model; those inside of it stay."""
    remove_hook_from_module(module)


def strip(module: Any) -> None:
    """Take the hooks off a module and all that is in it; what RAM holds goes back into the modules."""
    remove_hook_from_module(module, recurse=True)
    for part in module.modules():
        # Accelerate leaves the method of its class on it, as if somebody had put one in its place; it may be served since.
        left = getattr(vars(part).get("forward"), "__func__", None)
        if left is not None and any(left is vars(kind).get("forward") for kind in type(part).__mro__):
            del part.forward


def tie_again(model: Any) -> None:
    """Let parameters of the same memory be one: Accelerate gives every module back one of its own."""
    from torch.nn import Parameter

    first: dict[Any, Any] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta or type(parameter) is not Parameter or not parameter.numel():
            continue
        memory = (
            parameter.data_ptr(),
            parameter.device,
            parameter.dtype,
            parameter.shape,
            parameter.stride(),
        )
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = first.setdefault(memory, parameter)


def weights_loader(model: Any) -> Any:
    """What Accelerate reads a model's offloaded weights from, by full name; ``None`` without any."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        loader = getattr(weights, "dataset", weights)
        if loader is not None:
            if hasattr(loader, "device"):
                loader.device = "cpu"  # Accelerate's own choice is the first GPU, which may be full
            return loader
    return None


def drop_loaded(loader: Any, block: str) -> None:
    """Let go of what a block in RAM was loaded into: it is in its place, and would be there twice."""
    held = getattr(loader, "state_dict", None) or {}
    for name in [name for name in held if name == block or name.startswith(f"{block}.")]:
        del held[name]
