"""A model without its weights: its configuration, the dtype to load it in, and its modules on the meta device."""

from __future__ import annotations

import re
from typing import Any

from llm_magic.backends.accelerate.architecture import auto_class
from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.packed.prepacked import FOUR_BIT_PARTS
from llm_magic.backends.accelerate.source import gguf_model, hub
from llm_magic.backends.accelerate.source.capped_scores import have_scores_capped
from llm_magic.backends.accelerate.source.packed_checkpoint import find_packed, packing_facts
from llm_magic.backends.accelerate.source.sources import ModelFiles, read_json, weight_headers
from llm_magic.errors import SourceError
from llm_magic.harmless.words import plain_words
from llm_magic.headers import GgufHeader
from llm_magic.model import ModelSpec
from llm_magic.options import PUBLISHED

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_config(files: ModelFiles, *, unpacks: bool = False) -> Any:
    """Transformers' configuration of a folder.

    Parameters
    ----------
    unpacks
        Whether transformers is to unpack weights, although they could be read as they are.

    Raises
    ------
    SourceError
        When transformers does not know its ``model_type``, or a value in it is invalid.
    """
    from transformers import AutoConfig

    _refuse_packed(files)
    model_type = read_json(files.folder / "config.json").get("model_type")
    try:
        config = AutoConfig.from_pretrained(str(files.folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a hostile configuration can fail in any way a constructor can
        if not isinstance(model_type, str):
            raise SourceError(
                "config.json does not say its model_type.", "Name a model that transformers supports."
            ) from None
        if not _is_known(model_type):
            raise _unsupported(model_type) from None
        raise SourceError(
            f"The configuration of {files.name} ({model_type}) is invalid: {_first_line(error)}.",
            "Download its config.json again.",
        ) from None
    parts = (config, config.get_text_config(decoder=True))  # transformers looks in both
    packed = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if isinstance(packed, dict):
        packed["dequantize"] = True  # what is counted, and what every device can compute
        config.quantization_config = packed
    # Unless transformers is to unpack them, packed weights are read here, see `packed_checkpoint`.
    if find_packed(files) is not None and not unpacks:
        for part in parts:
            part.__dict__.pop("quantization_config", None)
    have_scores_capped(config)
    return config


def _refuse_packed(files: ModelFiles) -> None:
    """Refuse packed weights whose bytes and placement nobody here has checked.

    Raises
    ------
    SourceError
        For any ``quant_method`` that is not unpacked while it loads.
    """
    for packed in packing_facts(files):
        method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else packed
        if method and method not in PUBLISHED and find_packed(files) is None:
            raise SourceError(
                f"The weights of {files.name} are quantized ({plain_words(str(method)) or 'unknown'}), "
                "which cannot be placed yet.",
                "Load the original model instead, or a .gguf of it.",
            )


def dtype_of(spec: ModelSpec, files: ModelFiles, config: Any, header: GgufHeader | None) -> Any:
    """As ``from_pretrained(dtype="auto")`` decides: the configuration's, else that of the first weights."""
    import torch

    if spec.dtype != "auto":
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SourceError(
                f"{spec.dtype!r} is not a dtype to load in.", "Use auto, bfloat16, float16 or float32."
            )
        return dtype
    if header is not None:
        return getattr(torch, gguf_model.gguf_dtype(header))
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if not files.is_local and not files.weight_files and (found := hub.checkpoint_dtype(spec)):
        return getattr(torch, found)
    for weights in weight_headers(files):
        for tensor in sorted(weights.tensors, key=lambda tensor: tensor.name):
            if tensor.dtype in _FLOATS and not tensor.name.endswith((*FOUR_BIT_PARTS, ".SCB")):
                return getattr(torch, _FLOATS[tensor.dtype])
    return torch.float32


def build_skeleton(config: Any, dtype: Any) -> Any:
    """The model of ``config`` on the meta device, its weights tied.

    Raises
    ------
    SourceError
        When the architecture answers no text or needs a missing package, or the configuration builds no model.
    """
    import torch

    auto = auto_class(config)
    try:
        with default_dtype_kept(), torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except ImportError as error:
        raise SourceError(
            f"A model of the kind {config.model_type!r} needs a package that is missing: "
            f"{_first_line(error).partition('. ')[0]}.",
            "Install that package, and load the model again.",
        ) from None
    except Exception as error:  # sizes that do not fit together fail anywhere in a constructor
        raise SourceError(
            f"The configuration of this {config.model_type!r} model builds no model: {_first_line(error)}.",
            "Download its config.json again.",
        ) from None


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _unsupported(model_type: str) -> SourceError:
    import transformers

    return SourceError(
        f"transformers {transformers.__version__} does not support the architecture {model_type!r}.",
        "Upgrade it (pip install -U transformers), or load a model of another architecture.",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"(/|[A-Za-z]:\\)\S+", "…", text.splitlines()[0])[:160].rstrip(".")
