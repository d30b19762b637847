"""The models on this computer, and getting one from the hub: what ``%llm models`` and ``%llm pull`` do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llm_magic.errors import SourceError
from llm_magic.events import Progress
from llm_magic.folders import cache_folder, display_path
from llm_magic.headers import read_gguf_header
from llm_magic.model import ModelSpec


@dataclass(frozen=True)
class LocalModel:
    """A model on this computer.

    Attributes
    ----------
    name
        Short display name.
    kind
        ``"starter"``, ``"hub"``, ``"gguf"`` or ``"folder"``.
    bytes
        Bytes on disk, of its weights or its files.
    source
        What to type after ``%llm load``.
    detail
        Architecture or quantization, and what is missing, in a few words.
    """

    name: str
    kind: str
    bytes: int
    source: str
    detail: str = ""


def local_models(folder: Path | None = None) -> list[LocalModel]:
    """The starter, the hub models in the cache, the GGUF files and model folders in ``folder``.

    Parameters
    ----------
    folder
        Where files and folders are looked for, one level deep; the working folder by default.

    Returns
    -------
    list of LocalModel
        A damaged file is listed too, and its detail says so.
    """
    here = folder or Path.cwd()
    files = [*_starter(), *_gguf_files(here)]
    return [*files, *_conversions({file.name for file in files}), *_hub_models(), *_folders(here)]


def pull(spec: ModelSpec, progress: Progress) -> LocalModel:
    """Download a hub model whole: safetensors, configuration and tokenizer.

    Raises
    ------
    SourceError
        When the source is no hub id, there is no such model, or it cannot be downloaded.
    """
    from llm_magic.backends.accelerate.source.sources import fetch_weights, resolve

    if os.path.exists(os.path.expanduser(spec.source)) or spec.source == "starter":
        raise SourceError(f"{spec.source} is on this computer already.", f"Run: %llm load {spec.source}")
    files = fetch_weights(spec, resolve(spec, progress), progress)
    size = sum(file.stat().st_size for file in files.weight_files)
    return LocalModel(files.name, "hub", size, spec.source)


def _starter() -> list[LocalModel]:
    from llm_magic.backends.accelerate.source.sources import find_starter

    try:
        file = find_starter()
    except SourceError:
        return []
    return [_describe_gguf(file, "starter", "starter")]


def _hub_models() -> list[LocalModel]:
    from llm_magic.backends.accelerate.source.hub import cached_models

    return [
        LocalModel(source.rpartition("/")[2], "hub", size, source, detail)
        for source, size, detail in cached_models()
    ]


def _gguf_files(folder: Path) -> list[LocalModel]:
    files = [path for path in _entries(folder) if path.suffix.lower() == ".gguf" and path.is_file()]
    return [_describe_gguf(path, "gguf", _typed(path)) for path in files]


def _describe_gguf(path: Path, kind: str, source: str) -> LocalModel:
    from llm_magic.backends.accelerate.source.convert import converted_folder, is_converted, most_common_type

    size = path.stat().st_size
    try:
        header = read_gguf_header(path)
    except SourceError:
        return LocalModel(path.stem, kind, size, source, "damaged")
    converted = ", converted" if is_converted(converted_folder(path)) else ""
    return LocalModel(
        path.stem, kind, size, source, f"{header.architecture}, {most_common_type(header)}{converted}"
    )


def _conversions(listed: set[str]) -> list[LocalModel]:
    """GGUF files elsewhere that were converted once; without its file, a conversion is a folder like any other."""
    from llm_magic.backends.accelerate.source.convert import MARK
    from llm_magic.backends.accelerate.source.sources import read_json

    found = []
    for mark in sorted((cache_folder() / "converted").glob(f"*/{MARK}")):
        try:
            file = Path(str(read_json(mark).get("source", "")))
        except SourceError:
            continue
        size = sum(weights.stat().st_size for weights in mark.parent.glob("*.safetensors"))
        if not file.is_file():
            found.append(
                LocalModel(file.stem, "folder", size, _typed(mark.parent), "converted, its GGUF is gone")
            )
        elif file.stem not in listed:
            found.append(_describe_gguf(file, "gguf", _typed(file)))
    return found


def _typed(path: Path) -> str:
    """What to type for a file or a folder: as `display_path`, but one that always leads there."""
    shown = display_path(path)
    if Path(shown).expanduser().exists():
        return shown
    try:
        return Path(os.path.relpath(path)).as_posix()
    except ValueError:  # on another Windows drive
        return str(path)


def _folders(folder: Path) -> list[LocalModel]:
    found = []
    for path in [folder, *_entries(folder)]:
        if (path / "config.json").is_file() and (kind := _model_type(path)):
            weights = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
            size = sum(file.stat().st_size for file in weights)
            detail = kind + ("" if weights else ", configuration only")
            found.append(LocalModel(path.resolve().name, "folder", size, _typed(path), detail))
    return found


def _model_type(folder: Path) -> str:
    """What the configuration says it is; empty for one that is not a model's."""
    from llm_magic.backends.accelerate.source.sources import read_json

    try:
        return str(read_json(folder / "config.json").get("model_type", ""))[:40]
    except SourceError:
        return "damaged configuration"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a working folder that may not be listed holds no models for us
        return []
