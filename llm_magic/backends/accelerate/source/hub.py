"""Models of the Hugging Face hub: their metadata first, their weights only when they are asked for.

``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_ENDPOINT`` and the stored token are huggingface_hub's own and
work as everywhere else. Without a network, a model that is in its cache loads from there.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.source.sources import (
    CONFIG,
    INDEX,
    PICKLE_INDEX,
    WEIGHTS,
    ModelFiles,
    check_folder,
    read_json,
    resolve_folder,
    shard_names,
)
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent, Progress
from llm_magic.model import ModelSpec

_METADATA = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin"]
_ELSEWHERE = ["*/*"]  # copies in other formats: onnx/, original/
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def resolve(spec: ModelSpec, progress: Progress) -> ModelFiles:
    """Download a hub model's configuration and tokenizer, and look at what else it has.

    Raises
    ------
    SourceError
        When there is no such model or revision, it is gated, the hub cannot be reached and it is
        not in the cache, or it is no model that can be loaded.
    """
    folder = _download(spec, _METADATA, progress)
    name = spec.source.rpartition("/")[2]
    if not (folder / CONFIG).is_file():
        raise _no_config(spec, name)
    check_folder(folder)
    _choose_patterns(spec, folder)
    here = _present(spec, folder)
    if here:
        return replace(resolve_folder(folder, spec), name=name, is_local=False)
    return ModelFiles(folder, name, (), is_local=False)


def fetch_weights(spec: ModelSpec, files: ModelFiles, progress: Progress) -> ModelFiles:
    """Download a hub model's weights, safetensors where it has them; a download goes on where it was.

    Raises
    ------
    SourceError
        As `resolve`, and when the disk is full.
    """
    folder = _download(spec, [*_METADATA, *_choose_patterns(spec, files.folder)], progress)
    return replace(resolve_folder(folder, spec), name=files.name, is_local=False)


def checkpoint_dtype(spec: ModelSpec) -> str:
    """The dtype of a hub model's first weights, read from the headers on the hub; empty if unknown."""
    from huggingface_hub import HfApi

    with _explained(spec):
        try:
            metadata = HfApi().get_safetensors_metadata(spec.source, revision=spec.revision)
        except Exception as error:
            if type(error).__name__ in (
                "NotASafetensorsRepoError",
                "SafetensorsParsingError",
                "OfflineModeIsEnabled",
            ):
                return ""
            raise
    counts = {_FLOATS[key]: count for key, count in metadata.parameter_count.items() if key in _FLOATS}
    return max(counts, key=lambda dtype: counts[dtype], default="")


# -------------------------------------------------------------------------------------- files


def _choose_patterns(spec: ModelSpec, folder: Path) -> list[str]:
    """Patterns of the weight files to load: safetensors, or ``.bin`` when that is allowed and all there is."""
    names = _repo_files(spec, folder)
    if any(_matches(name, _SAFETENSORS) for name in names):
        return [*_SAFETENSORS]
    if any(_matches(name, _PICKLES) for name in names):
        if spec.allow_pickle:
            return [*_PICKLES]
        raise SourceError(
            f"{spec.source} has only .bin weights, a format that can hide code.",
            "Prefer a safetensors version; to read these with weights_only=True add --allow-pickle.",
        )
    return [*_SAFETENSORS]


def _matches(name: str, patterns: list[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _repo_files(spec: ModelSpec, folder: Path) -> list[str]:
    """Names of a repository's files: as its last listing says, else those in the cache."""
    from huggingface_hub import get_cached_repo_tree

    try:
        return [entry.path for entry in get_cached_repo_tree(spec.source, revision=folder.name)]
    except Exception:  # no listing is kept, as in a cache that was copied: the folder is all that is known
        return [path.name for path in folder.iterdir()]


def _present(spec: ModelSpec, folder: Path) -> bool:
    """Whether all weight files are in the cache already."""
    for index in (INDEX, PICKLE_INDEX) if spec.allow_pickle else (INDEX,):
        if (folder / index).is_file():
            return all((folder / name).is_file() for name in shard_names(folder, index))
    return (folder / WEIGHTS).is_file() or (spec.allow_pickle and (folder / "pytorch_model.bin").is_file())


def _no_config(spec: ModelSpec, name: str) -> SourceError:
    try:
        from huggingface_hub import HfApi

        files = HfApi().list_repo_files(spec.source, revision=spec.revision)
    except Exception:  # only to say more; what is wrong is known already
        files = []
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        return SourceError(
            f"{spec.source} holds GGUF files only ({len(ggufs)} of them, first {ggufs[0][:80]}).",
            f"Get one (hf download {spec.source} FILE --local-dir .), then: %llm load FILE",
        )
    return SourceError(
        f"{name} is no model that transformers loads: it has no config.json.", "Name another model."
    )


def _download(spec: ModelSpec, patterns: list[str], progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(spec), _byte_bars(spec, progress) as bar:
        return Path(
            snapshot_download(
                spec.source,
                revision=spec.revision,
                allow_patterns=patterns,
                ignore_patterns=_ELSEWHERE,
                tqdm_class=bar,
                library_name="llm-magic",
            )
        )


@contextmanager
def _byte_bars(spec: ModelSpec, progress: Progress) -> Iterator[type[Any]]:
    """A tqdm class that reports the bytes written as progress instead of drawing a bar.

    huggingface_hub updates it from its own threads; what ``progress`` raises there ends the download.
    """
    from tqdm import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in the stubs only
        def __init__(self, *args: Any, **options: Any) -> None:
            title = str(options.get("desc") or "")
            self.reports = options.get("unit") == "B" and not title.startswith("Downloading")
            super().__init__(*args, **{k: v for k, v in options.items() if k != "name"} | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self.reports:
                with lock:
                    progress(
                        PhaseEvent("downloading", int(self.n), int(self.total or 0), "bytes", spec.source)
                    )
            return None

    yield Bar


# ------------------------------------------------------------------------------ what went wrong


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turn the errors of huggingface_hub and its HTTP client into ours."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_reached(spec, error) from None
    except errors.HFValidationError:
        raise SourceError(f"{spec.source!r} is no hub id.", "A hub id is written org/model.") from None
    except errors.HfHubHTTPError as error:
        raise _refused(spec, error) from None
    except OSError as error:
        raise SourceError(
            f"{spec.source} cannot be downloaded: {error.strerror or type(error).__name__}.",
            "Check the free space of the cache (HF_HOME), and run it again: it goes on where it was.",
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "hf_xet")):
            raise
        raise SourceError(
            f"The hub cannot be reached ({type(error).__name__}).",
            "Check the connection and run it again: a download goes on where it was.",
        ) from None


def _refused(spec: ModelSpec, error: Any) -> SourceError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{spec.source} is gated: its authors want to know who uses it.",
            f"Accept its terms on the page of {spec.source}, then run: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(f"There is no model {spec.source} on the hub, or it is private.", _suggest(spec))
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{spec.source} has no revision {spec.revision!r}.",
            "Leave --revision out, or see the model's page.",
        )
    status = getattr(getattr(error, "response", None), "status_code", "?")
    return SourceError(f"The hub refused {spec.source} (HTTP {status}).", "Try again later.")


def _not_reached(spec: ModelSpec, error: Exception) -> SourceError:
    from huggingface_hub import constants

    if isinstance(getattr(error, "snapshot_path", None), str) or "incomplete" in str(error):
        what = f"Only a part of {spec.source} is in the cache"
    else:
        what = f"{spec.source} is not in the cache"
    if constants.is_offline_mode():
        return SourceError(
            f"{what}, and offline mode is on.",
            f"Unset HF_HUB_OFFLINE and run: %llm pull {spec.source}",
        )
    return SourceError(
        f"{what}, and the hub cannot be reached.", f"Check the connection. {_cached_hint(spec)}".strip()
    )


def _cached_hint(spec: ModelSpec) -> str:
    close = difflib.get_close_matches(spec.source, cached_ids(), n=1)
    return f"Did you mean {close[0]}, which is in the cache?" if close else ""


def _suggest(spec: ModelSpec) -> str:
    from huggingface_hub import HfApi

    try:
        found = [m.id for m in HfApi().list_models(search=spec.source.rpartition("/")[2], limit=10)]
    except Exception:  # a suggestion is not worth an error
        found = []
    close = difflib.get_close_matches(spec.source, [*found, *cached_ids()], n=1, cutoff=0.4) or found[:1]
    if close:
        return f"Did you mean {close[0]}? For a private model run: hf auth login"
    return "Check the spelling; for a private model run: hf auth login"


# ---------------------------------------------------------------------------------- the cache


def cached_ids() -> list[str]:
    """Ids of the models in huggingface_hub's cache, from the names of its folders alone."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    names = [path.name for path in folder.glob("models--*")] if folder.is_dir() else []
    return sorted(re.sub("--", "/", name.removeprefix("models--"), count=1) for name in names)


def cached_models() -> list[tuple[str, int, str]]:
    """``(id, bytes on disk, detail)`` of the cached models that have a configuration."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for revision in repo.revisions:
            config = next((f.file_path for f in revision.files if f.file_name == CONFIG), None)
            if repo.repo_type == "model" and config is not None:
                found.append((repo.repo_id, repo.size_on_disk, _cached_detail(config)))
                break
    return found


def _cached_detail(config: Path) -> str:
    try:
        model_type = str(read_json(config).get("model_type", ""))[:40]
    except SourceError:
        return "damaged configuration"
    weights = any(config.parent.glob("*.safetensors")) or any(config.parent.glob("*.bin"))
    return model_type if weights else f"{model_type}, configuration only".lstrip(", ")
