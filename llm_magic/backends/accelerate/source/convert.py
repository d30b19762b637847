"""A GGUF file converted once to a safetensors folder, kept in the cache.

Reading a GGUF through transformers unpacks every weight, each time; its conversion loads fifty
times faster and can be offloaded. A conversion is made in a temporary folder beside its place and
renamed when it is whole, so an interrupted one never looks finished and two at once are safe.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.source import gguf_model
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent, Progress
from llm_magic.folders import cache_folder, make_private
from llm_magic.headers import GgufHeader, read_gguf_header
from llm_magic.units import GIB, MIB, format_bytes

_FORMAT = 1  # raise it when conversions are made differently
MARK = "conversion.json"
_SHARD_BYTES = 4 * GIB
_STALE_S = 86_400
_SPARE_BYTES = 64 * MIB  # tokenizer and configuration, with room to spare
_DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


def converted_folder(gguf: Path) -> Path:
    """Where the conversion of ``gguf`` is kept; the folder exists once it is converted.

    The name changes when the file does: it is made of its size, its time of change and samples
    of its bytes.
    """
    try:
        return cache_folder() / "converted" / f"{_safe(gguf.stem)}-{_fingerprint(gguf)}"
    except OSError as error:
        raise SourceError(f"{gguf.name} cannot be read: {error.strerror}.", "Check the file.") from None


def is_converted(folder: Path) -> bool:
    """Whether ``folder`` holds a whole conversion."""
    return (folder / MARK).is_file()


def _safe(stem: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in stem)[:80].lstrip(".") or "model"


def _fingerprint(gguf: Path) -> str:
    state = gguf.stat()
    digest = hashlib.sha256(f"{_FORMAT} {state.st_size} {state.st_mtime_ns}".encode())
    with gguf.open("rb") as file:
        for part in range(17):
            file.seek(part * max(0, state.st_size - 64 * 1024) // 16)
            digest.update(file.read(64 * 1024))
    return digest.hexdigest()[:16]


def convert_gguf(gguf: Path, progress: Progress) -> Path:
    """The folder with the conversion of ``gguf``, made now if it is not there.

    Raises
    ------
    SourceError
        When the file is damaged, its architecture is not supported, or the disk is full.
    """
    target = converted_folder(gguf)
    if is_converted(target):
        return target
    header = read_gguf_header(gguf)
    with _new_folder(target, gguf) as folder:
        progress(PhaseEvent("converting", 0, 0, "bytes", gguf.name))
        if gguf_model.needs_whole_load(header):
            _save_loaded_model(gguf, header, folder, progress)
        else:
            _save_model(gguf, header, folder, progress)
        _save_tokenizer(gguf, header, folder)
        _write_mark(folder, gguf, header)
    return target


def _save_model(gguf: Path, header: GgufHeader, folder: Path, progress: Progress) -> None:
    import torch

    from llm_magic.backends.accelerate.source.skeleton import build_skeleton

    dtype = getattr(torch, gguf_model.gguf_dtype(header))
    config = gguf_model.gguf_config(gguf, header)
    skeleton = build_skeleton(config, dtype)
    config.dtype, config.architectures = dtype, [type(skeleton).__name__]
    config.save_pretrained(folder)
    if skeleton.generation_config is not None:
        skeleton.generation_config.save_pretrained(folder)
    shapes = _parameter_shapes(skeleton)
    _check_space(folder, sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize, gguf)
    with SafetensorsWriter(folder, shapes, dtype, _SHARD_BYTES) as writer:
        done, total = 0, sum(tensor.bytes for tensor in header.tensors)
        for name, tensor, size in gguf_model.iterate_weights(gguf, header, skeleton, dtype):
            writer.write(name, tensor)
            done += size
            progress(PhaseEvent("converting", done, total, "bytes", gguf.name))
        if writer.missing:
            raise SourceError(
                f"{gguf.name} lacks {len(writer.missing)} of its model's tensors, first {min(writer.missing)}.",
                "Get the model's safetensors version, or another conversion of it.",
            )


def _save_loaded_model(gguf: Path, header: GgufHeader, folder: Path, progress: Progress) -> None:
    """Let transformers load all weights and save them: for architectures whose tensors it rearranges itself."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
    from llm_magic.backends.accelerate.quiet import bars_into

    dtype = getattr(torch, gguf_model.gguf_dtype(header))
    _check_space(folder, sum(math.prod(t.shape) for t in header.tensors) * dtype.itemsize, gguf)
    with (
        default_dtype_kept(),
        bars_into(
            lambda _title, done, total, name: progress(PhaseEvent("converting", done, total, "tensors", name))
        ),
    ):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
            raise SourceError(
                f"{gguf.name} cannot be read by transformers ({type(error).__name__}).",
                "Get the model's safetensors version.",
            ) from None
        model.config.name_or_path = ""
        model.save_pretrained(folder)


def _parameter_shapes(skeleton: Any) -> dict[str, tuple[int, ...]]:
    tied = skeleton.all_tied_weights_keys
    return {name: tuple(p.shape) for name, p in skeleton.named_parameters() if name not in tied}


def _save_tokenizer(gguf: Path, header: GgufHeader, folder: Path) -> None:
    tokenizer = gguf_model.gguf_tokenizer(gguf, header)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):  # how it was loaded, not what it is
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    _save_end_tokens(gguf_model.end_tokens(header, tokenizer), folder)


def _save_end_tokens(ends: list[int], folder: Path) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    config.pop("_from_model_config", None)  # or transformers would make it anew, without the end tokens
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_mark(folder: Path, gguf: Path, header: GgufHeader) -> None:
    """What the conversion came from, for lists of models; written last, it says that all is there."""
    mark = {
        "source": str(gguf.resolve()),
        "name": str(header.metadata.get("general.name", gguf.stem)),
        "license": str(header.metadata.get("general.license", "")),
        "quantization": most_common_type(header),
    }
    (folder / MARK).write_text(json.dumps(mark, indent=2), encoding="utf-8")


def most_common_type(header: GgufHeader) -> str:
    """The ggml type that holds the most bytes (``"Q4_K"``)."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="")


def _check_space(folder: Path, needed: int, gguf: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise SourceError(
            f"{gguf.name} needs {format_bytes(needed)} of disk for its conversion; {format_bytes(free)} are free.",
            "Free some space, or set LLM_MAGIC_CACHE to a folder on another disk.",
        )


class SafetensorsWriter:
    """Writes a model's tensors as they come, in any order, into shards laid out beforehand.

    Parameters
    ----------
    folder
        Where ``model.safetensors``, or the shards and their index, are written.
    shapes
        Parameter name -> shape, of everything that will be written.
    dtype
        torch dtype of all tensors.
    shard_bytes
        Size above which another shard begins.
    """

    def __init__(
        self, folder: Path, shapes: dict[str, tuple[int, ...]], dtype: Any, shard_bytes: int
    ) -> None:
        self.folder, self.dtype = folder, dtype
        self.shapes = shapes
        self.missing = set(shapes)
        self._shards = _split(shapes, dtype.itemsize, shard_bytes)
        self._places: dict[str, tuple[Any, int]] = {}
        self._files: list[Any] = []

    def __enter__(self) -> SafetensorsWriter:
        for number, names in enumerate(self._shards, 1):
            file = (self.folder / self._name(number)).open("wb")
            self._files.append(file)
            header, offsets = _safetensors_header(names, self.shapes, self.dtype)
            file.write(header)
            file.truncate(len(header) + offsets[-1])
            self._places |= {n: (file, len(header) + at) for n, at in zip(names, offsets, strict=False)}
        if len(self._shards) > 1:
            self._write_index()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def _name(self, number: int) -> str:
        total = len(self._shards)
        return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"

    def _write_index(self) -> None:
        weight_map = {name: self._name(n) for n, names in enumerate(self._shards, 1) for name in names}
        size = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def write(self, name: str, tensor: Any) -> None:
        """Put one tensor into its place.

        Raises
        ------
        SourceError
            When the model has no such parameter, or it has another shape.
        """
        import torch

        if self.shapes.get(name) != tuple(tensor.shape):
            raise SourceError(
                f"The tensor {name!r} has the shape {tuple(tensor.shape)}; its model needs {self.shapes.get(name)}.",
                "Get the file again, or the model's safetensors version.",
            )
        file, at = self._places[name]
        file.seek(at)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.discard(name)


def _split(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _safetensors_header(
    names: list[str], shapes: dict[str, tuple[int, ...]], dtype: Any
) -> tuple[bytes, list[int]]:
    """The header with its length prefix, and the tensors' offsets with the end of the last one."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets = [0]
    for name in names:
        offsets.append(offsets[-1] + math.prod(shapes[name]) * dtype.itemsize)
        entries[name] = {"dtype": _DTYPES[str(dtype)], "shape": shapes[name], "data_offsets": offsets[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # weights begin on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, offsets


@contextmanager
def _new_folder(target: Path, gguf: Path) -> Iterator[Path]:
    """A folder that takes its place under ``target`` when the block ends well, and is gone if it does not."""
    temporary = None
    try:
        make_private(target.parent)
        _sweep(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        _publish(temporary, target)
    except OSError as error:
        raise _disk_error(error, gguf) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what conversions that were killed left behind, a day later: nobody works on it any more."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        if time.time() - leftover.stat().st_mtime > _STALE_S:
            shutil.rmtree(leftover, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not is_converted(target):  # somebody else may have finished first; theirs is as good
            raise


def _disk_error(error: OSError, gguf: Path) -> SourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(
            f"The disk is full: {gguf.name} cannot be converted.",
            "Free some space, or set LLM_MAGIC_CACHE to a folder on another disk.",
        )
    return SourceError(
        f"{gguf.name} cannot be converted: {error.strerror or 'input or output error'}.",
        "Check that the cache folder (LLM_MAGIC_CACHE) is writable.",
    )
