"""A model's head, packed: with a large vocabulary it is much of what a token reads.

The libraries leave it as it is, and must, where it shares its matrix with the embeddings. Here it gets a matrix of its
own: rows of embeddings are looked up wherever they are, and need not be where the head is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.backends.accelerate.packed.weights import packed_weights
from llm_magic.backends.accelerate.served.cpu_linear import linear_by_kernels
from llm_magic.backends.accelerate.served.served_class import serve
from llm_magic.planning.packed import UNPACKED_HEAD_BYTES


def untie_head(model: Any, path: str) -> None:
    """Give the head a matrix of its own, without bytes, where it has that of the embeddings.

    Parameters
    ----------
    model
        With parameters on the meta device.
    path
        Of its head.
    """
    import torch

    name = f"{path}.weight"
    ties = dict(model.all_tied_weights_keys or {})
    if name not in ties and name not in ties.values():
        return
    head = model.get_submodule(path)
    weight = head._parameters["weight"]
    head._parameters["weight"] = torch.nn.Parameter(torch.empty_like(weight), requires_grad=False)
    model.all_tied_weights_keys = _without(ties, name)
    # Where transformers ties anew, it asks each model in the model what its class says.
    for owner, part in model.named_modules():
        prefix = f"{owner}." if owner else ""
        if hasattr(part, "get_expanded_tied_weights_keys") and name.startswith(prefix):
            inner = name.removeprefix(prefix)
            part._tied_weights_keys = _without(part.get_expanded_tied_weights_keys(), inner)


def serve_head(head: Any) -> None:
    """Let a packed head compute by our kernels, and where there are none for its bytes, some rows at a time.

    Unpacked as a whole it would take the room that it saves. And the layer of bitsandbytes for 8 bits asks the host
    whether there are large activations, for which a captured step cannot wait.
    """
    serve(head, _head_by_kernels)


def _head_by_kernels(head: Any, states: Any, *_args: Any, **_options: Any) -> Any:
    import torch

    weight, bias = head._parameters["weight"], head._parameters.get("bias")
    if states.is_cpu or head.training or weight is None or type(weight) is torch.Tensor:
        return linear_by_kernels(head, states)
    packed = packed_weights(weight)
    if packed is None or not _is_unpacked(packed, states):
        return None
    step = max(1, UNPACKED_HEAD_BYTES // (packed.columns * states.dtype.itemsize))
    starts = range(0, packed.rows, step)
    parts = (_numbers(head, packed, slice(start, start + step), states.dtype) for start in starts)
    outputs = torch.cat([torch.nn.functional.linear(states, part) for part in parts], dim=-1)
    return outputs if bias is None else outputs + bias.to(states.dtype)


def _is_unpacked(packed: Any, states: Any) -> bool:
    """Whether the library would unpack the matrix for this product: with 4 bits one token has a kernel."""
    if packed.kind in ("nf4", "fp4"):
        return bool(states.numel() > packed.columns and not packed.columns % packed.group)
    return str(packed.kind) in ("int8", "float8")


def _numbers(head: Any, packed: Any, rows: slice, dtype: Any) -> Any:
    """What some rows stand for."""
    import torch

    if packed.kind in ("nf4", "fp4"):
        data = packed.data.view(packed.rows, -1)[rows]
        scales = packed.scales.view(packed.rows, -1)[rows].reshape(-1)
        shape = (data.shape[0], packed.columns)
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            data.reshape(-1, 1), scales, packed.group, packed.kind, shape, dtype
        )
    # bitsandbytes' own forward, which computes on a CPU without kernels of ours, moves them there.
    scales = packed.scales if packed.scales is not None else head.state.SCB
    factors = (scales.view(-1, 1)[rows] * packed.factor).to(dtype)
    return packed.data[rows].to(dtype).mul_(factors)


def _without(ties: Mapping[str, str], name: str) -> dict[str, str]:
    """The ties of the others, when one parameter has left: those who had its values have those of the first of them."""
    heirs = [target for target, source in ties.items() if source == name]
    kept = {target: source for target, source in ties.items() if name not in (target, source)}
    return kept | dict.fromkeys(heirs[1:], heirs[0] if heirs else "")
