"""A model's linear layers and experts, replaced by packed ones that have no bytes yet.

The library's own loaders pack while they load and refuse any placement that is not all on one
device. Here a model is prepared on the meta device, where every linear layer becomes the library's
packed module, and each block is packed as its weights arrive. The bits are those that
transformers makes; where the block goes then is the plan's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.packed.prepacked_stacks import MXFP4_GROUP
from llm_magic.backends.accelerate.quantizing.kept_layers import layers_to_keep, reads_head
from llm_magic.backends.accelerate.quantizing.libraries import import_library
from llm_magic.backends.accelerate.quantizing.library_layers import is_packed
from llm_magic.backends.accelerate.quantizing.methods import (
    METHODS,
    Method,
    find_method,
    has_gpu_kernel,
    method_of,
)
from llm_magic.backends.accelerate.quantizing.packed_head import serve_head
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear
from llm_magic.errors import OptionError
from llm_magic.options import AS_NUMBERS


@dataclass(frozen=True)
class Choice:
    """What is said of the layers in place of the libraries' choice: by a checkpoint that was packed before, or by a user.

    Attributes
    ----------
    stays
        Patterns for layers that are left as they are; ``None``: as transformers chooses.
    group
        Columns that share a scale, 0 for all of a row; ``None``: as quanto chooses.
    head
        Path of the head, if it is to be packed, too.
    head_method
        The method for it.
    experts
        What the experts stay in, if they are not packed by the method of the layers; empty: they are.
    """

    stays: Sequence[str] | None = None
    group: int | None = None
    head: str = ""
    head_method: str = ""
    experts: str = ""


def prepare(model: Any, name: str, dtype: Any, choice: Choice | None = None) -> tuple[str, ...]:
    """Replace the linear layers of a model on the meta device by packed ones, still without bytes.

    As transformers chooses: all but tied layers, what is kept in float32 and, unless it is chosen, the head. Layers
    whose weight is also read without a call stay too (the time steps of a Mamba). Stacked experts,
    which transformers leaves as they are, are packed one by one; where an architecture computes with
    whole stacks (Llama 4), they stay.

    Parameters
    ----------
    dtype
        torch dtype in which the packed layers compute.
    choice
        Which layers, and in which groups, where that was chosen before.

    Returns
    -------
    tuple of str
        Names of the parameters that ``pack_block`` will pack.

    Raises
    ------
    OptionError
        When the library is missing, or finds nothing to pack in this model, or the head cannot be packed.
    """
    import torch

    method = method_of(name)
    if method.library:
        import_library(method.library)
    choice = choice or Choice()
    if "mxfp4" in (name, choice.experts) and has_gpu_kernel("mxfp4") and torch.cuda.is_available():
        import_library("bitsandbytes")
    skipped, group = layers_to_keep(model, choice.stays), choice.group
    before = dict(model.named_modules())
    with quiet(), default_dtype_kept():
        outer = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            _replace(model, method, dtype, skipped, group)
            linear = {path: m for path, m in model.named_modules() if before.get(path) is not m}
            packed = (
                *(f"{path}.weight" for path in linear),
                *_replace_experts(model, *_for_experts(method, choice), dtype, skipped),
            )
            head = _replace_head(model, dtype, choice) if packed else ()
        finally:
            torch.set_default_dtype(outer)
    if not packed:
        able = _able(model, skipped) if method.library else [AS_NUMBERS]
        raise OptionError(
            f"{name} finds no linear layer to pack in {type(model).__name__}.",
            f"Use --quantize {' or '.join(able)}." if able else "Leave out --quantize.",
        )
    for layer in linear.values():
        serve_linear(layer)
    model.eval().requires_grad_(False)
    _refuse_saving(model, name)
    return (*packed, *head)


def _refuse_saving(model: Any, name: str) -> None:
    """Let ``save_pretrained`` refuse what no loader could read.

    Its files would hold packed bytes beside a configuration that knows of none, and 8-bit integers
    load as if they were weights. An adapter on the model may be saved: none of its bytes are packed.
    """
    held = ref(model)  # no cycle, which would keep the model's memory

    def save_pretrained(*args: Any, **options: Any) -> Any:
        found: Any = held()
        if getattr(found, "_hf_peft_config_loaded", False):
            return type(found).save_pretrained(found, *args, **options)
        raise OptionError(
            f"A model that --quantize {name} packed cannot be saved.",
            "Keep the files it was loaded from: they are packed again at each load.",
        )

    model.save_pretrained = save_pretrained


def _able(model: Any, skipped: list[str]) -> list[str]:
    """Methods that would find something: quanto's pack all that is a ``Linear``, the others just that."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = [m for path, m in model.named_modules() if should_convert_module(path, skipped)]
    found = {
        "bitsandbytes": any(type(module) in (Linear, Conv1D) for module in modules),
        "optimum.quanto": any(isinstance(module, Linear) for module in modules),
    }
    return [method.name for method in METHODS.values() if found[method.library]]


def _replace(model: Any, method: Method, dtype: Any, skipped: list[str], group: int | None) -> None:
    if not method.library:
        _replace_by_scaled(model, method, skipped, group)
        return
    if method.library == "bitsandbytes":
        from transformers import BitsAndBytesConfig
        from transformers.integrations import replace_with_bnb_linear

        config = (
            BitsAndBytesConfig(load_in_8bit=True)
            if method.bits == 8
            else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=method.name, bnb_4bit_compute_dtype=dtype
            )
        )
        replace_with_bnb_linear(model, skipped, config)
        setattr(model, f"is_loaded_in_{method.bits}bit", True)
        return
    from transformers import QuantoConfig
    from transformers.integrations import replace_with_quanto_layers

    config = QuantoConfig(weights=method.name.removeprefix("quanto-"))
    replace_with_quanto_layers(model, config, skipped)
    if group is not None:
        from optimum.quanto import QModuleMixin

        for module in model.modules():
            if isinstance(module, QModuleMixin):
                module.weight_group_size = group or None


def _replace_by_scaled(model: Any, method: Method, skipped: list[str], group: int | None) -> None:
    from torch.nn import Linear
    from transformers.quantizers.quantizers_utils import should_convert_module

    from llm_magic.backends.accelerate.packed.scaled_floats import ScaledLinear

    for path, module in list(model.named_modules()):
        if type(module) is Linear and should_convert_module(path, skipped):
            owner, _, leaf = path.rpartition(".")
            layer = ScaledLinear(module, method.name, group or 0)
            model.get_submodule(owner)._modules[leaf] = layer


def _for_experts(method: Method, choice: Choice) -> tuple[Method, int | None]:
    """By which method experts are packed, and in which groups."""
    return (method_of(choice.experts), MXFP4_GROUP) if choice.experts else (method, choice.group)


def _replace_experts(
    model: Any, method: Method, group: int | None, dtype: Any, skipped: list[str]
) -> Iterator[str]:
    """Let modules with stacks of experts hold packed ones; the names of the stacks."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    from llm_magic.backends.accelerate.experts.packed_experts import replace_stacks
    from llm_magic.backends.accelerate.experts.stacks import can_route

    def linear(inputs: int, outputs: int) -> Any:
        return _packed_linear(method, dtype, inputs, outputs, group)

    for path, module in list(model.named_modules()):
        # Transformers' interface for experts says how they are laid out.
        if hasattr(module, "is_concatenated") and should_convert_module(path, skipped) and can_route(module):
            yield from (f"{path}.{name}" for name in replace_stacks(module, linear))


def _replace_head(model: Any, dtype: Any, choice: Choice) -> tuple[str, ...]:
    """Put a packed layer in the place of the head, if that is chosen; the name of its weight."""
    import torch

    if not choice.head:
        return ()
    owner, _, leaf = choice.head.rpartition(".")
    head, parent = model.get_submodule(choice.head), model.get_submodule(owner)
    if is_packed(head):
        raise OptionError("The head is packed already, as its layers are.", "Leave out --quantize-head.")
    if reads_head(model, choice.head):
        raise OptionError(
            f"{type(parent).__name__} looks at its head's weight, which has to be numbers for that.",
            "Leave out --quantize-head.",
        )
    alone = torch.nn.ModuleDict({"linear": head})
    _replace(alone, find_method(choice.head_method), dtype, [], None)
    serve_head(alone["linear"])
    parent._modules[leaf] = alone["linear"]
    return (f"{choice.head}.weight",)


def _packed_linear(method: Method, dtype: Any, inputs: int, outputs: int, group: int | None) -> Any:
    """A layer of the library as `prepare` makes them, without bytes."""
    import torch

    with torch.device("meta"):
        alone = torch.nn.ModuleDict({"linear": torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)})
    _replace(alone, method, dtype, [], group)
    return alone["linear"]
