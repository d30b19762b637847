"""A placement in the words of llama.cpp, which places layers by options: ``-ngl``, ``--tensor-split``, ``-ot``.

llama.cpp keeps what is not on a GPU in files that it maps into memory, so RAM and disk are one place to it;
and what is there is computed by the CPU. See ``common/arg.cpp`` of llama.cpp for the options.
"""

from __future__ import annotations

from itertools import groupby

from llm_magic.plan import Plan, Workload

_ALL = 99  # as its documentation writes "every layer"


def llama_cpp_options(plan: Plan) -> str:
    """Options that place the layers of a plan, as near as llama.cpp can; the context and the length of a pass too.

    ``-ngl N`` puts the last ``N`` layers on GPUs, and with one more the head; ``--tensor-split`` gives
    each GPU a run of them; ``-ot`` names the layers that are elsewhere than these two say, and those whose
    experts alone are. Of several patterns that a name matches the first one counts.
    """
    layers = [place for place in plan.placements if place.block.kind in ("encoder", "decoder")]
    homes = [place.compute if place.is_split else place.home for place in layers]
    gpus = [gpu.id for gpu in plan.machine.gpus]
    on_gpu = [home for home in homes if home in gpus]
    context = f"-c {plan.workload.context_length}"
    if plan.workload.prefill_tokens != Workload.prefill_tokens:
        context += f" -ub {plan.workload.prefill_tokens}"
    if not on_gpu:
        return f"-ngl 0 {context}"
    words, overrides = _layers(homes, gpus, plan)
    if len(set(on_gpu)) > 1:
        words.append(f"--tensor-split {','.join(str(on_gpu.count(gpu)) for gpu in gpus)}")
        if not _is_split_in_order(on_gpu, gpus):
            overrides = _overrides(homes, gpus)
    if split := [i for i, place in enumerate(layers) if place.is_split]:
        overrides = ",".join([_override(split, "CPU", "ffn_.*_exps"), *([overrides] if overrides else [])])
    return " ".join([*words, *([f'-ot "{overrides}"'] if overrides else []), context])


def _layers(homes: list[str], gpus: list[str], plan: Plan) -> tuple[list[str], str]:
    """``-ngl`` alone where the first layers are off the GPUs; else all of them, and exceptions."""
    first = next(i for i, home in enumerate(homes) if home in gpus)
    if all(home in gpus for home in homes[first:]):
        head = next((p.home for p in plan.placements if p.block.kind == "head"), "")
        with_head = int(head in gpus)
        count = _ALL if first == 0 and with_head else len(homes) - first + with_head
        return [f"-ngl {count}"], ""
    return [f"-ngl {_ALL}"], _override([i for i, home in enumerate(homes) if home not in gpus], "CPU")


def _overrides(homes: list[str], gpus: list[str]) -> str:
    """Every layer by name, where GPUs take turns."""
    names = {gpu: f"CUDA{index}" for index, gpu in enumerate(gpus)}
    places = dict.fromkeys(names.get(home, "CPU") for home in homes)
    return ",".join(
        _override([i for i, home in enumerate(homes) if names.get(home, "CPU") == place], place)
        for place in places
    )


def _override(layers: list[int], place: str, part: str = "") -> str:
    r"""``"blk\.(1|3)\.=CPU"``."""
    return rf"blk\.({'|'.join(map(str, layers))})\.{part}={place}"


def _is_split_in_order(on_gpu: list[str], gpus: list[str]) -> bool:
    order = [gpu for gpu, _ in groupby(on_gpu)]
    return order == [gpu for gpu in gpus if gpu in order]
