"""Accelerate's hooks of a placed model: their state after a forward pass that did not end."""

from __future__ import annotations

from typing import Any


def offload_again(model: Any) -> None:
    """Send weights home that an interrupted forward pass left on the compute device.

    Accelerate brings a module's weights before its ``forward`` and drops them after; an exception
    in between leaves them there, and tied ones in its table.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if (
                part is not None
                and getattr(part, "offload", False)
                and hasattr(part, "tied_pointers_to_remove")
            ):
                part.post_forward(module, ())


def remove_hooks(model: Any) -> None:
    """Take all hooks off; offloaded weights stay on the meta device."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
