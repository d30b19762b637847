"""Packing a model's linear layers and experts into 8, 4 or 2 bits, block by block.

The library's own loaders pack while they load and refuse any placement that is not all on one
device. Here a model is prepared on the meta device, where every linear layer becomes the library's
packed module, and each block is packed as its weights arrive. The bits are those that
transformers makes; where the block goes then is the plan's business.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import ref

from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.packed import four_bits
from llm_magic.backends.accelerate.packed.packing import (
    Parts,
    arrange,
    arrange_one,
    bind,
    has_order,
    in_bytes,
    parts,
    scaled_floats,
    template,
)
from llm_magic.backends.accelerate.packed.prepacked import PackedByBitsAndBytes, Prepacked, damaged
from llm_magic.backends.accelerate.packed.prepacked_groups import Groups, PackedInGroups
from llm_magic.backends.accelerate.packed.prepacked_stacks import MXFP4_GROUP, PackedStacks
from llm_magic.backends.accelerate.quantizing.packed_head import serve_head
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear
from llm_magic.backends.accelerate.served.latent_attention import MATRIX, may_attend_to_latents
from llm_magic.errors import OptionError, PlanError, SourceError
from llm_magic.options import AS_NUMBERS

_PACKAGES = {"bitsandbytes": "bitsandbytes>=0.50", "optimum.quanto": "optimum-quanto>=0.2.7"}
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Warnings about what a user cannot change, by their logger; the second comes with every layer, the third with quanto where
torch could use a GPU, and there is none but CUDA's compiler."""

BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit formats."""


@dataclass(frozen=True)
class Method:
    """A way in which linear layers are packed.

    Every method can be offloaded: its parts are plain tensors, which travel as they are.

    Attributes
    ----------
    name
        As in ``--quantize NAME``.
    library
        Module that packs and computes; nothing for floats that are taken from checkpoints, and that nobody packs here.
    bits
        Of one weight, without its share of the statistics.
    devices
        Types of torch devices that can compute with it.
    """

    name: str
    library: str
    bits: int
    devices: tuple[str, ...] = ("cpu", "cuda", "xpu", "mps")


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("nf4", "bitsandbytes", 4),
        Method("fp4", "bitsandbytes", 4),
        Method("int8", "bitsandbytes", 8),
        Method("int4", "optimum.quanto", 4),
        Method("int2", "optimum.quanto", 2),
        Method("float8", "optimum.quanto", 8, ("cpu", "cuda", "xpu")),
        Method("quanto-int8", "optimum.quanto", 8),
    )
}
_PUBLISHED: Mapping[str, Method] = {
    method.name: method for method in (Method("mxfp4", "", 4), Method("fp8", "", 8, ("cpu", "cuda", "xpu")))
}
"""Those of checkpoints that are kept as they are; nothing here packs weights so."""


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


# ------------------------------------------------------------------------------ which method, and can it


def find_method(name: str, option: str = "--quantize") -> Method:
    """The method of this name, for an option; ``int8`` is quanto's where only that library is installed.

    Raises
    ------
    OptionError
        When there is no such method, or its library is not installed.
    """
    choose = f"Choose one of {', '.join(METHODS)}."
    if name in _PUBLISHED:
        raise OptionError(
            f"{name} is what some checkpoints are published in; nothing here packs weights so.", choose
        )
    if name not in METHODS:
        raise OptionError(f"{name!r} is no way to pack weights.", choose)
    method = METHODS[name]
    if name == "int8" and not _installed(method.library) and _installed("optimum.quanto"):
        return METHODS["quanto-int8"]
    require(method.library, f"{option} {name} needs {method.library}, which")
    return method


def method_of(name: str) -> Method:
    """The method of this name by which layers are packed, or were before, when their checkpoint was made.

    Raises
    ------
    OptionError
        As `find_method`.
    """
    return _PUBLISHED[name] if name in _PUBLISHED else find_method(name)


def require(library: str, what: str) -> None:
    """Refuse to go on without a library; ``what`` begins the sentence that ends with "is not installed".

    Raises
    ------
    OptionError
        With the command that installs it.
    """
    if not _installed(library):
        raise OptionError(f"{what} is not installed.", f"Install it: pip install '{_PACKAGES[library]}'")


def has_gpu_kernel(name: str) -> bool:
    """Whether what multiplies weights of a method with a token on a GPU is installed; ``mxfp4`` does without it, slowly."""
    return name != "mxfp4" or _installed("bitsandbytes")


def refuse_devices(name: str, devices: set[str]) -> None:
    """Refuse, before anything is loaded, a placement that computes where the method cannot.

    Parameters
    ----------
    devices
        Torch device names of the placement's ``compute``, such as ``{"cuda:0", "cpu"}``.

    Raises
    ------
    PlanError
        With the device, and the methods that can.
    """
    for device in sorted(devices):
        kind = device.partition(":")[0]
        if kind not in method_of(name).devices:
            able = [method.name for method in METHODS.values() if kind in method.devices]
            able = [AS_NUMBERS] if name in _PUBLISHED else able
            raise PlanError(
                f"{name} weights cannot be computed on {device}.",
                f"Use --quantize {' or '.join(able)}." if able else "Leave out --quantize.",
            )


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ImportError:  # the package around it is missing, or broken
        return False


def import_library(name: str) -> Any:
    """Import ``bitsandbytes`` or ``optimum.quanto`` without its noise and without the network."""
    for logger, start in _NOISE.items():
        found = logging.getLogger(logger)
        if not any(isinstance(known, _Silenced) for known in found.filters):
            found.addFilter(_Silenced(start))
    with _no_kernels_from_the_hub():
        return importlib.import_module(name)


class _Silenced(logging.Filter):
    """Drops the messages that start so."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._start)


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    # bitsandbytes, where the package "kernels" is installed, downloads code while it is imported.
    modules: dict[str, Any] = sys.modules
    before = modules.get("kernels", _NOISE)  # a module, or the None of somebody else
    modules["kernels"] = None  # how Python spells "not to be imported"
    try:
        yield
    finally:
        del modules["kernels"]
        if before is not _NOISE:
            modules["kernels"] = before


# --------------------------------------------------------------------------------- preparing the model


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
    skipped, group = _skipped(model, choice.stays), choice.group
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
        able = [AS_NUMBERS] if name in _PUBLISHED else _able(model, skipped)
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


def _skipped(model: Any, stays: Sequence[str] | None) -> list[str]:
    from transformers.quantizers.base import HfQuantizer

    named = HfQuantizer.get_modules_to_not_convert(model, stays, model._keep_in_fp32_modules)
    # Its names are patterns; ours are whole names.
    return [*named, *(f"{re.escape(path)}$" for path in _read_directly(model))]


def _read_directly(model: Any) -> Iterator[str]:
    """Linear layers whose owner's code, or ours in its place, uses ``self.<layer>.weight``, which would be packed bytes."""
    for path, owner in model.named_modules():
        kind: Any = type(owner)
        names = _names_in_code(kind, r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")
        if may_attend_to_latents(owner):
            names |= {MATRIX}
        for leaf in owner._modules:
            if leaf in names:
                yield f"{path}.{leaf}" if path else leaf


@cache
def _names_in_code(kind: Any, pattern: str) -> frozenset[str]:
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(pattern, code))


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

    for path, module in list(model.named_modules()):
        if type(module) is Linear and should_convert_module(path, skipped):
            owner, _, leaf = path.rpartition(".")
            layer = scaled_floats().ScaledLinear(module, method.name, group or 0)
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


def reads_head(model: Any, path: str) -> bool:
    """Whether the code around a model's head uses its weight, or asks for its dtype, as a Mamba does to cast states to it."""
    owner, _, leaf = path.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    return leaf in _names_in_code(kind, r"self\.(\w+)\.weight\b(?!\.(?:device|shape))")


def _packed_linear(method: Method, dtype: Any, inputs: int, outputs: int, group: int | None) -> Any:
    """A layer of the library as `prepare` makes them, without bytes."""
    import torch

    with torch.device("meta"):
        alone = torch.nn.ModuleDict({"linear": torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)})
    _replace(alone, method, dtype, [], group)
    return alone["linear"]


# ------------------------------------------------------------------------------------ packing a block


def pack_block(
    block: Any, weights: Mapping[str, Any], device: Any, compute: Any = None, experts: Any = None
) -> None:
    """Give a block of a prepared model its weights, packed where its layers are.

    Parameters
    ----------
    block
        A module of a prepared model.
    weights
        Tensors by name within the block, of the checkpoint's orientation, on any device; cast to
        the layers' dtype here where they are packed. Others are taken as they are. Or what was packed before.
    device
        Where to do the work; a GPU is quick. The parameters lie there afterwards, or on ``compute``.
    compute
        The device that will compute the block, if another one: it decides the order of the bytes.
    experts
        Where stacks of experts lie afterwards, if elsewhere; those that have an order stay with the others.

    Raises
    ------
    AttributeError, KeyError
        When a name is not a parameter of the block.
    """
    import torch

    device = torch.device(device)
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        module = block.get_submodule(path)
        if leaf in module._modules:
            pack_stack(module._modules[leaf], value, device, device if compute is None else compute, experts)
            continue
        meta = module._parameters[leaf]
        if leaf == "weight" and _packer(module) is not None:
            _pack(module, value if isinstance(value, Prepacked) else value.to(device, meta.dtype), device)
            arrange_one(module, leaf, device if compute is None else compute, fresh=True)
        else:
            numbers = value
            if isinstance(value, Prepacked):
                is_transposed = getattr(module, "is_transposed", False)
                numbers = _unpacked(value, meta, device, is_transposed=is_transposed)
            _check_shape(tuple(meta.shape), tuple(numbers.shape), f"The weight {name}")
            # A copy: what comes from a file may be pages of it.
            held = numbers.to(device, copy=True)
            module._parameters[leaf] = torch.nn.Parameter(held, requires_grad=False)
    arrange(block, device if compute is None else compute, fresh=True)


def _unpacked(value: Prepacked, meta: Any, device: Any, *, is_transposed: bool) -> Any:
    """The numbers of what is no packed layer: of an embedding, or of experts, whose matrices may be stacked as ``(in, out)``."""
    import torch

    matrices = [value.numbers(device, index) for index in range(len(value.matrices))]
    numbers = torch.stack(matrices) if len(meta.shape) > 2 else matrices[0]
    if len(meta.shape) > 2 and is_transposed:
        numbers = numbers.transpose(1, 2).contiguous()
    _check_shape(tuple(meta.shape), tuple(numbers.shape), f"The packed weight {value.matrices[0][0]}")
    return numbers


def _pack(module: Any, value: Any, device: Any, index: int = 0) -> None:
    """Give a layer its weight, packed: a tensor, or one of the matrices that were packed before."""
    if isinstance(value, Prepacked) and not value.method:
        value = value.numbers(device, index)
        value = value.T if _is_transposed(module) else value
    if isinstance(value, Prepacked):
        pack = partial(_taken, index=index, device=device)
    else:
        pack = _packer(module)
        _check_shape(
            _shape(module), tuple(value.T.shape if _is_transposed(module) else value.shape), "A weight"
        )
    module._parameters["weight"] = pack(module, value)
    # Once through the template: what it binds now is what every later buffer gets.
    bind(template(module, "weight").bindings(parts(module, "weight")))


def pack_stack(stack: Any, values: Any, device: Any, compute: Any, experts: Any = None) -> None:
    """Give a `PackedStack` its experts, one after the other; the arguments are as for `pack_block`."""
    linear = stack.linear
    dtype = linear.weight.dtype

    def packed() -> Iterator[Parts]:
        for index in range(stack.experts):
            if isinstance(values, Prepacked):
                _pack(linear, values, device, index)
            else:
                _pack(linear, stack.matrix(values, index).to(device, dtype), device)
            arrange(linear, compute, fresh=True)
            found = parts(linear, "weight")
            stays = experts is None or has_order(linear, "weight")
            yield found if stays else {part: tensor.to(experts) for part, tensor in found.items()}

    stack.fill(packed())


def leave_stack(stack: Any, values: PackedStacks) -> None:
    """Let a `PackedStack` have experts that stay in their files: all of them but the bytes.

    Raises
    ------
    SourceError
        When the files have others.
    """
    linear = stack.linear
    _check_shape(_shape(linear), values.shape(), f"The packed weight {values.matrices[0][0]}")
    linear._parameters["weight"] = scaled_floats().ScaledFloats(*linear.form.empty(), linear.form)
    stack.fill(parts(linear, "weight") for _ in range(stack.experts))


def is_packed(module: Any) -> bool:
    """Whether a layer is one of the libraries' packed ones."""
    return _packer(module) is not None


def _packer(module: Any) -> Any:
    bitsandbytes, quanto = (sys.modules.get(library) for library in _PACKAGES)
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit):
        return _pack_4_bits
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return _pack_8_bits
    if quanto is not None and isinstance(module, quanto.QModuleMixin):
        return _pack_quanto
    return _pack_floats if isinstance(module, scaled_floats().ScaledLinear) else None


def _pack_floats(_module: Any, _value: Any) -> Any:
    raise AssertionError("only what was packed before is in scaled floats")


def _taken(module: Any, value: Any, *, index: int, device: Any) -> Any:
    """The weight of a layer that was packed before."""
    if isinstance(value, PackedByBitsAndBytes):
        return _taken_from_bitsandbytes(module, value, index, device)
    if isinstance(value, PackedStacks):
        data, scales = value.parts(index, device)
        return _scaled(module, data, scales, value.matrices[index][0])
    assert isinstance(value, PackedInGroups)
    return _taken_from_groups(module, value, index, device)


def _taken_from_bitsandbytes(module: Any, value: PackedByBitsAndBytes, index: int, device: Any) -> Any:
    from bitsandbytes.nn import Int8Params

    data, scales, shape = value.parts(index, device)
    _check_shape(_shape(module), shape, f"The packed weight {value.matrices[index][0]}")
    if value.method == "int8":
        return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)
    return _four_bits(module, data, scales, value.dtype)


def _scaled(module: Any, data: Any, scales: Any, name: str) -> Any:
    """A packed weight in floats with scales."""
    form, columns = module.form, data.shape[-1] * (8 // method_of(module.form.method).bits)
    _check_shape(_shape(module), (data.shape[0], columns), f"The packed weight {name}")
    groups = form.columns // form.group
    if scales.shape[1] == 1:  # of all of a row
        scales = scales.expand(-1, groups)
    if tuple(scales.shape) != (form.rows, groups):
        raise damaged(name)
    return scaled_floats().ScaledFloats(data.contiguous(), scales.contiguous(), form)


def _taken_from_groups(module: Any, value: PackedInGroups, index: int, device: Any) -> Any:
    import torch

    held, name = value.groups(device, index), value.matrices[index][0]
    _check_shape(_shape(module), held.shape, f"The packed weight {name}")
    if _packer(module) is _pack_floats:
        if held.entries.dtype != torch.float8_e4m3fn or held.zeros is not None:
            raise damaged(name)
        return _scaled(module, held.entries.view(torch.uint8), held.scales, name)
    if _packer(module) is _pack_8_bits:
        return _rows_of_8_bits(held, name)
    _without_activations(module, device)
    if module.weight_qtype.bits == 8:
        return _quanto_rows(module, held, name, value.dtype)
    return _quanto_groups(module, held, name, value.dtype)


def _rows_of_8_bits(held: Groups, name: str) -> Any:
    """A packed weight of bitsandbytes, whose scales are of the largest entry there can be."""
    from bitsandbytes.nn import Int8Params

    entries, scales = _signed(held, name), held.scales.reshape(-1) * 127
    return Int8Params(entries, requires_grad=False, has_fp16_weights=False, CB=entries, SCB=scales)


def _quanto_rows(module: Any, held: Groups, name: str, dtype: Any) -> Any:
    """A packed weight of quanto with a scale for each row; it becomes numbers of ``dtype``."""
    import torch
    from optimum.quanto import WeightQBytesTensor

    kind = module.weight_qtype
    entries = _signed(held, name)
    stride = (held.shape[1], 1)
    packed = WeightQBytesTensor(kind, 0, held.shape, stride, entries, held.scales.to(dtype), None)
    return torch.nn.Parameter(packed, requires_grad=False)


def _quanto_groups(module: Any, held: Groups, name: str, dtype: Any) -> Any:
    """A packed weight of quanto with a scale and a shift for each group of columns."""
    import torch
    from optimum.quanto import WeightQBitsTensor

    columns = held.shape[1]
    group = module.weight_group_size or columns
    if held.entries.dtype != torch.uint8 or held.zeros is None or held.scales.shape[1] * group != columns:
        raise damaged(name)
    # What torch's kernel wants in place of the shift is rounded once, from this, and it has an order of its own:
    # `arrange` makes either of it.
    shift = (held.zeros * held.scales).reshape(-1, 1)
    scale = held.scales.to(dtype).reshape(-1, 1)
    entries, stride = in_bytes(held.entries.view(-1, group)), (columns, 1)
    packed = WeightQBitsTensor(
        module.weight_qtype, 0, module.weight_group_size, held.shape, stride, entries, scale, shift
    )
    return torch.nn.Parameter(packed, requires_grad=False)


def _signed(held: Groups, name: str) -> Any:
    """Entries of 8 bits as integers with a sign, of which 0 stands for zero."""
    import torch

    if held.scales.shape[1] > 1:
        raise damaged(name)
    if held.zeros is None and held.entries.dtype == torch.int8:
        return held.entries
    if held.zeros is None or held.entries.dtype != torch.uint8 or bool((held.zeros != 128).any()):
        raise damaged(name)
    return (held.entries ^ 128).view(torch.int8)


def _shape(module: Any) -> tuple[int, ...]:
    return module.out_features, module.in_features


def _check_shape(expected: tuple[int, ...], shape: tuple[int, ...], what: str) -> None:
    """What computes with the weight reads as many bytes as its shape says."""
    if shape != expected:
        raise SourceError(
            f"{what} has the shape {shape} where config.json says {expected}.",
            "The files do not belong together: download the model again.",
        )


def _pack_4_bits(module: Any, value: Any) -> Any:
    from bitsandbytes.nn import Params4bit

    meta, value = module._parameters["weight"], _as_linear(module, value)
    if value.device.type == "cpu" and not value.numel() % meta.blocksize:
        data, scales = four_bits.packed(value, meta.quant_type, meta.blocksize)
        return _four_bits(module, data, scales, value.dtype)
    packed = Params4bit(value, requires_grad=False, module=module, **_options(meta))
    return packed.to(value.device)


def _four_bits(module: Any, data: Any, scales: Any, dtype: Any) -> Any:
    """A packed weight of its parts; it becomes numbers of ``dtype``."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Params4bit

    meta, shape = module._parameters["weight"], torch.Size((module.out_features, module.in_features))
    code = get_4bit_type(meta.quant_type, device=data.device)
    state = QuantState(scales, shape, code, meta.blocksize, meta.quant_type, dtype)
    options = _options(meta) | {"quant_state": state, "bnb_quantized": True}
    return Params4bit(data, requires_grad=False, module=module, **options)


def _options(meta: Any) -> dict[str, Any]:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return {name: getattr(meta, name) for name in names}


def _pack_8_bits(module: Any, value: Any) -> Any:
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    # Its own .to() packs only what comes from the CPU: a weight would leave the GPU and come again.
    data, scales, _ = int8_vectorwise_quant(_as_linear(module, value).contiguous().to(torch.float16))
    return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)


def _as_linear(module: Any, value: Any) -> Any:
    """The weight as ``(out, in)``."""
    return value.T if _is_transposed(module) else value


def _is_transposed(module: Any) -> bool:
    """Whether it is in place of a GPT-2 ``Conv1D``, whose weight is stored the other way round."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(module, "source_cls", object), Conv1D)


def _pack_quanto(module: Any, value: Any) -> Any:
    import torch
    from optimum.quanto import quantize_weight

    kind, groups = module.weight_qtype, module.weight_group_size
    if kind.bits == 8:
        scale, shift = module.optimizer(value, qtype=kind, axis=0), None
        # Of a row of zeros, as of a token that nobody trained, floats of 8 bits would be nan.
        scale = torch.where(scale == 0, 1, scale)
    else:
        scale, shift = module.optimizer(value, qtype=kind, axis=0, group_size=groups)
    # Not "optimized": for some GPUs that means kernels which it compiles at the first use. ``arrange``
    # chooses the one that torch has.
    packed = quantize_weight(
        value, kind, 0, scale, shift, group_size=groups, activation_qtype=None, optimized=False
    )
    _without_activations(module, value.device)
    return torch.nn.Parameter(packed, requires_grad=False)


def _without_activations(module: Any, device: Any) -> None:
    """Give quanto's layer the scales of activations that it does not pack."""
    import torch

    for name in ("input_scale", "output_scale"):
        meta = module._buffers[name]
        module._buffers[name] = torch.ones(meta.shape, dtype=meta.dtype, device=device)


# -------------------------------------------------------------------------------- bytes, before packing


def packed_bytes(module: Any, dtype: Any) -> int:
    """Bytes that the weight of a prepared module takes once packed, its statistics included.

    Parameters
    ----------
    module
        A module whose weight ``prepare`` named, or the one in the place of stacked experts that it named.
    dtype
        torch dtype in which it computes.
    """
    if (linear := module.__dict__.get("linear")) is not None:
        return int(module.experts) * packed_bytes(linear, dtype)
    rows, columns = int(module.out_features), int(module.in_features)
    itemsize, pack = int(dtype.itemsize), _packer(module)
    if pack is _pack_floats:
        return int(module.form.bytes)
    if pack is _pack_4_bits:
        count = rows * columns
        return -(-count // 2) + 4 * -(-count // BLOCK)  # nibbles, and a float32 scale for each group
    if pack is _pack_8_bits:
        return rows * columns + 4 * rows
    bits = int(module.weight_qtype.bits)
    if bits == 8:
        return rows * columns + itemsize * rows
    if groups := module.weight_group_size:
        rows, columns = rows * columns // int(groups), int(groups)
    # Rows are packed on top of each other; each has a scale and a shift, and of a single one each number.
    return -(-rows * bits // 8) * columns + 2 * itemsize * (columns if rows == 1 else rows)
