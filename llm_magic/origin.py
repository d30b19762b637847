"""What a loaded model was made of, beside the words of its command: they may name another one later.

A folder may be another after ``cd``, hold weights that were trained since, or a device map that was edited.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions

_READ = {".safetensors", ".bin", ".json", ".gguf", ".jinja", ".model", ".txt", ".tiktoken"}
"""Of a folder, what a load reads: a notebook beside the weights is saved all the time."""

Seen = tuple[Path, int, int]
"""A file, its bytes, and when it was written, in nanoseconds."""


@dataclass(frozen=True)
class Origin:
    """What decides which model a command loads, and where to.

    Attributes
    ----------
    spec, options
        As the user gave them.
    ctx_size
        Tokens of context that are planned for without ``-c``.
    files
        The local files that they name, as they are.
    """

    spec: ModelSpec
    options: LoadOptions
    ctx_size: int
    files: tuple[Seen, ...]

    @staticmethod
    def of(spec: ModelSpec, options: LoadOptions, ctx_size: int) -> Origin:
        """That of a model that would be loaded now."""
        device_map = options.device_map if isinstance(options.device_map, str) else ""
        names = (spec.source, spec.draft, device_map)
        files = tuple(seen for name in names if name for seen in _files(name))
        return Origin(spec, options, 0 if options.ctx_size else ctx_size, files)


def _files(name: str) -> Iterator[Seen]:
    """The file of this name, or the files of the folder; none for what is no path."""
    try:
        path = Path(name).expanduser().resolve()
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            if file.is_file() and (file == path or file.suffix in _READ):
                state = file.stat()
                yield file, state.st_size, state.st_mtime_ns
    except (OSError, ValueError, RuntimeError):  # whoever loads it says what is wrong
        return
