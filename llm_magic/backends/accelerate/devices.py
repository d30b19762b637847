"""Accelerators as torch sees them: CUDA, ROCm, XPU and MPS, what is free on them, how fast they are.

Speeds are measured with the operations that a model uses. Reading is a bf16 matrix-vector product,
the work of decoding; operations are a bf16 matrix product over 256 tokens, the work of prefill;
links are copies through pinned memory; layers of transformers show what a layer takes beside that. The CPU's reads
and the links are measured at once, too.
All of it takes some five seconds for the CPU and less for a GPU, whose first use loads the driver's
libraries besides; importing transformers takes some more, if it was not yet.
"""

from __future__ import annotations

import datetime
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_magic.backends.accelerate.beside import rates_together
from llm_magic.backends.accelerate.layer_time import layer_times
from llm_magic.backends.accelerate.memory_errors import release_memory
from llm_magic.backends.accelerate.packed_time import PackedSpeeds, packed_speeds
from llm_magic.backends.accelerate.served_model import serve_plain_modules
from llm_magic.host.memory import host_memory
from llm_magic.host.processors import cpu_cache_bytes, cpu_name
from llm_magic.host.speed import best_of, thread_words
from llm_magic.machine import Device, Link
from llm_magic.units import MIB

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 64 * MIB
_CPU_BUDGET_S, _GPU_BUDGET_S, _LINK_BUDGET_S, _BESIDE_BUDGET_S = 0.25, 0.1, 0.05, 0.1
_COLUMNS = 8192  # of the matrices: as wide as the layers of a model of 30B parameters or more
_PREFILL_TOKENS = 256
_TOO_LITTLE_BYTES = 128 * MIB
_LARGEST_BYTES = 1024 * MIB  # that are read
_MATRIX_BYTES = 32 * MIB
_MANY_CACHES = 4  # times a cache: what is read is then hardly in it


def accelerators(measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
    """GPUs and the links between them and the CPU; nothing where torch cannot be imported.

    Parameters
    ----------
    measure
        Measure speeds and links. A device ``cpu`` then carries the CPU's speed, and no memory.
        A speed that cannot be measured (memory full, busy) is 0, and its link is left out.
    """
    try:
        import torch
    except (ImportError, OSError):  # missing, or its libraries do not load
        return (), ()
    with _quiet():
        if measure:
            release_memory()  # what an allocator keeps of a loaded model's memory is room, too
        devices = (*_cuda(torch), *_xpu(torch), *_mps(torch))
        if not measure:
            return devices, ()
        measured = tuple(_measured(torch, device, _GPU_BUDGET_S, others=devices) for device in devices)
        links = tuple(_links(torch, [d.id for d in devices if not d.unified]))
        measured = tuple(_read_again(torch, device, _GPU_BUDGET_S) for device in measured)
        cpu = Device("cpu", "cpu", cpu_name(), 0, host_memory().free, capability=_cpu_capability(torch))
        cpu = replace(cpu, threads=torch.get_num_threads())
        cpu, links = _together(torch, _measured(torch, cpu, _CPU_BUDGET_S, others=devices), links)
        _give_back(torch, devices)
        return (*measured, cpu), links


# --- What there is


def _cuda(torch: Any) -> Iterator[Device]:
    """CUDA and ROCm, which torch calls by the same name."""
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # lost or held exclusively by another process: there, but with no room
            free, total = 0, facts.total_memory
        own = torch.cuda.memory_reserved(index)
        device = _gpu(
            f"cuda:{index}", facts.name, total, free, own, unified=bool(getattr(facts, "is_integrated", 0))
        )
        uuid = str(getattr(facts, "uuid", ""))
        device = replace(device, capability=_gpu_capability(torch, facts))
        yield replace(device, uuid=uuid if uuid.startswith(("GPU-", "MIG-")) or not uuid else f"GPU-{uuid}")


def _xpu(torch: Any) -> Iterator[Device]:
    if not torch.xpu.is_available():
        return
    for index in range(torch.xpu.device_count()):
        facts = torch.xpu.get_device_properties(index)
        total = facts.total_memory
        own = torch.xpu.memory_reserved(index)
        try:
            free, _ = torch.xpu.mem_get_info(index)
        except RuntimeError:  # some drivers do not tell: count what this process holds
            free = total - own
        yield _gpu(
            f"xpu:{index}",
            facts.name,
            total,
            free,
            own,
            unified=bool(getattr(facts, "is_integrated_gpu", False)),
        )


def _mps(torch: Any) -> Iterator[Device]:
    if not torch.backends.mps.is_available():
        return
    total, own = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
    yield _gpu("mps", f"{cpu_name()} GPU", total, total - own, own, unified=True)


def _gpu(device_id: str, name: str, total: int, free: int, own: int, *, unified: bool) -> Device:
    """A GPU of which this process holds ``own`` bytes. Unified memory is not freer than the RAM it is."""
    if unified:
        free = min(free, host_memory().free)
    free = max(0, min(free, total))
    return Device(
        device_id, "gpu", name, total, free, unified=unified, other_bytes=max(0, total - free - own)
    )


def _gpu_capability(torch: Any, facts: Any) -> str:
    """The compute capability; AMD's GPUs have the name of an architecture."""
    if torch.version.hip:
        return str(facts.gcnArchName).partition(":")[0]
    return f"{facts.major}.{facts.minor}"


def _cpu_capability(torch: Any) -> str:
    """The widest vector instructions of the CPU that kernels for packed weights ask for."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = dict(ask()) if ask else {}
    names = {"avx512_bf16": "avx512_bf16", "avx512_f": "avx512", "avx2": "avx2"}
    known = next((name for key, name in names.items() if found.get(key)), "")
    return known or str(torch.backends.cpu.get_cpu_capability()).lower()


# --- How fast it is


def _measured(torch: Any, device: Device, budget_s: float, *, others: Sequence[Device] = ()) -> Device:
    """``device`` with its speeds, each as far as there is room to measure it; 0 where there is not.

    Beside ``others`` layers of the CPU are blocks among theirs, which are computed one by one.
    """
    if device.free_bytes < _TOO_LITTLE_BYTES:
        return device
    is_cpu = device.id == "cpu"
    with torch.no_grad():
        read = _or_nothing(lambda: _read_speed(torch, device, budget_s))
        flops = _or_nothing(lambda: _flops(torch, device.id, budget_s))
        finish = _finished(torch, device.id, lambda: None)
        again = (lambda size: _product_speed(torch, "cpu", size, budget_s)) if is_cpu else (lambda _: read)
        took = layer_times(device.id, again, flops, finish, budget_s, are_ahead=not others)
        packed = packed_speeds(_cpu_bytes(device), budget_s / 2) if is_cpu else PackedSpeeds()
    if not (read or flops):
        return device
    threads = f", {thread_words(torch.get_num_threads())}" if is_cpu else ""
    return replace(
        device,
        read_bytes_per_s=read,
        flops=flops,
        layer_s=took.layer_s,
        ahead_s=took.ahead_s,
        state_s=took.state_s,
        packed=packed.products,
        unpacked=packed.numbers,
        measured_on=_today(),
        method=f"bf16 matrix products{threads}",
    )


def _read_again(torch: Any, device: Device, budget_s: float) -> Device:
    """``device`` as it reads after some work, if that is faster: the first work finds clocks of an idle GPU."""
    if not device.read_bytes_per_s:
        return device
    with torch.inference_mode():
        again = _or_nothing(lambda: _read_speed(torch, device, budget_s))
    return replace(device, read_bytes_per_s=max(device.read_bytes_per_s, again))


def _or_nothing(measure: Callable[[], float]) -> float:
    try:
        return measure()
    except RuntimeError:  # out of memory, or no bf16 there
        return 0.0


def _read_speed(torch: Any, device: Device, budget_s: float) -> float:
    """Bytes per second of a matrix-vector product; 0 where only its cache could be measured."""
    if device.id == "cpu":
        return _product_speed(torch, "cpu", _cpu_bytes(device), budget_s)
    size = min(_LARGEST_BYTES, device.free_bytes // 2)
    if size < _MANY_CACHES * _cache_bytes(torch, device.id):
        return 0.0
    return _product_speed(torch, device.id, size, budget_s)


def _cpu_bytes(cpu: Device) -> int:
    """What to read for the speed of the RAM: more than its caches hold, where there is room for that."""
    return min(max(256 * MIB, min(2 * cpu_cache_bytes(), _LARGEST_BYTES)), cpu.free_bytes // 4)


def _product_speed(torch: Any, device_id: str, size: int, budget_s: float) -> float:
    product, count = _product(torch, device_id, size)
    return count / best_of(_finished(torch, device_id, product), budget_s)


def _cache_bytes(torch: Any, device_id: str) -> int:
    """The last cache before a GPU's memory, 72 to 126 MB in some; 0 where nobody tells."""
    family = device_id.partition(":")[0]
    if family not in ("cuda", "xpu"):
        return 0
    facts = getattr(torch, family).get_device_properties(device_id)
    return int(getattr(facts, {"cuda": "L2_cache_size", "xpu": "last_level_cache_size"}[family], 0))


def _product(torch: Any, device_id: str, size: int) -> tuple[Callable[[], object], int]:
    """Matrix-vector products, and the bytes of the matrices. Ones: pages of zeros may all be the same page.

    One matrix for a GPU, whose launches would take longer than reading such as layers have; of these for a CPU, which
    reads a large one quicker (31 and 28 GB/s on a Xeon).
    """
    count = max(1, size // _MATRIX_BYTES) if device_id == "cpu" else 1
    layers = [_layer(torch, device_id, size // count // (2 * _COLUMNS), _COLUMNS) for _ in range(count)]
    vector = torch.ones(1, _COLUMNS, dtype=torch.bfloat16, device=device_id)
    return lambda: [layer(vector) for layer in layers], sum(int(layer.weight.nbytes) for layer in layers)


def _layer(torch: Any, device_id: str, rows: int, columns: int) -> Any:
    """A linear layer of ones, computed as those of a loaded model."""
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta").eval().requires_grad_(False)
    weight = torch.ones(rows, columns, dtype=torch.bfloat16, device=device_id)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    serve_plain_modules(layer)
    return layer


def _flops(torch: Any, device_id: str, budget_s: float) -> float:
    """Operations per second of a matrix product over the tokens of one prefill pass."""
    tokens, width = (_PREFILL_TOKENS, 2048) if device_id == "cpu" else (2048, 4096)
    layer = _layer(torch, device_id, width, width)
    states = torch.ones(tokens, width, dtype=torch.bfloat16, device=device_id)
    seconds = best_of(_finished(torch, device_id, lambda: layer(states)), budget_s)
    return 2 * tokens * width * width / seconds


def _links(torch: Any, gpu_ids: list[str]) -> Iterator[Link]:
    """Both directions between the CPU and each GPU, and between each two GPUs."""
    for gpu in gpu_ids:
        yield from _measured_link(torch, "cpu", gpu)
        yield from _measured_link(torch, gpu, "cpu")
        for other in gpu_ids:
            if other != gpu:
                yield from _measured_link(torch, gpu, other)


def _measured_link(torch: Any, source: str, target: str) -> Iterator[Link]:
    try:
        seconds = _copy_seconds(torch, source, target)
    except RuntimeError:  # out of memory: the link is assumed instead
        return
    name = "pinned copies" if "cpu" in (source, target) else "device copies"
    yield Link(source, target, _COPY_BYTES / seconds, name, _today())


def _copy_seconds(torch: Any, source: str, target: str) -> float:
    def buffer(device_id: str) -> torch.Tensor:
        tensor: torch.Tensor = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device_id)
        return tensor.pin_memory() if device_id == "cpu" else tensor

    here, there = buffer(source), buffer(target)
    gpu = target if source == "cpu" else source
    return best_of(_finished(torch, gpu, lambda: there.copy_(here, non_blocking=True)), _LINK_BUDGET_S)


def _together(torch: Any, cpu: Device, links: tuple[Link, ...]) -> tuple[Device, tuple[Link, ...]]:
    """The CPU, and the links to GPUs, with what they reach while the other works; as they are without a GPU."""
    gpus = [link.target for link in links if link.source == "cpu"]
    if not gpus or not cpu.read_bytes_per_s:
        return cpu, links
    try:
        with torch.inference_mode():
            product, count = _product(torch, "cpu", _cpu_bytes(cpu))
            read, sent = rates_together(product, count, gpus, _BESIDE_BUDGET_S)
    except RuntimeError:  # out of memory
        return cpu, links
    beside = tuple(
        replace(link, beside_bytes_per_s=sent[link.target]) if link.source == "cpu" else link
        for link in links
    )
    return replace(cpu, beside_bytes_per_s=read), beside


def _finished(torch: Any, device_id: str, work: Callable[[], object]) -> Callable[[], object]:
    """``work`` that returns when the device is done with it."""
    family = device_id.partition(":")[0]
    if family == "cpu":
        return work
    module = getattr(torch, family)

    def run() -> None:
        work()
        module.synchronize() if family == "mps" else module.synchronize(device_id)

    return run


def _give_back(torch: Any, devices: tuple[Device, ...]) -> None:
    """Return what measuring took, pinned memory too, which torch would keep for later."""
    if devices:
        gc.collect()  # a model whose modules know each other
    for family in {device.id.partition(":")[0] for device in devices}:
        getattr(torch, family).empty_cache()
    if devices and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about drivers that are too old: such a GPU is simply not there, and doctor tells why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _today() -> str:
    return datetime.date.today().isoformat()
