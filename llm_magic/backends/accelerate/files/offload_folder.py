"""A private folder for weights that are written again to be offloaded.

transformers reads most offloaded weights from the model's own files; those it converts while
loading (experts that are stacked, ``.bin`` checkpoints) it writes to a folder, one file per tensor.
The folder is new, closed to other users, and gone when the model is. A process that is killed leaves
its folder behind, unlocked: whoever makes the next one removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path

from llm_magic.errors import PlanError, SourceError
from llm_magic.folders import cache_folder, display_path, make_private

_PREFIX = "llm-magic-"
_NEW_S = 60.0  # a younger folder may not be locked yet by the process that makes it


class OffloadFolder:
    """A fresh folder, mode 0700, that ``remove`` or the end of the process deletes.

    Parameters
    ----------
    parent
        Where to make it; empty for the cache folder. It is created when it does not exist.

    Raises
    ------
    PlanError
        When it cannot be made there.
    """

    def __init__(self, parent: str = "") -> None:
        base = _base(parent)
        self.path = _make_private(base)
        self._given: Counter[str] = Counter()
        lock = _locked(self.path)
        self._remove = weakref.finalize(self, _remove_tree, self.path, _identity(self.path), lock)
        _remove_orphans(base)

    def new_file(self, name: str) -> Path:
        """A path in it for the bytes of the block ``name``, which was never given before.

        Who has read a file there may remember it by its path.
        """
        number = f".{self._given[name]}" if self._given[name] else ""
        self._given[name] += 1
        return self.path / f"{name}{number}.bin"

    def protect(self) -> None:
        """Give the files in it mode 0600 (the folder's own mode kept others out until now)."""
        for path in self.path.iterdir():
            if not path.is_symlink():
                path.chmod(stat.S_IRUSR | stat.S_IWUSR)

    def remove(self) -> None:
        """Delete it with everything in it. Safe to call twice."""
        self._remove()


def check_tensor_names(names: list[str]) -> None:
    """Refuse names that would leave the folder when they become file names.

    Raises
    ------
    SourceError
        When a name holds a slash of either kind, ``..`` or NUL.
    """
    for name in names:
        if any(part in name for part in ("/", "\\", "..", "\0")):
            raise SourceError(
                f"A tensor of this model has an unsafe name: {name[:60]!r}.", "Do not use this file."
            )


def disk_error(error: BaseException, parent: str = "") -> PlanError | None:
    """The error to show when ``error`` says that the disk is full or not writable, else ``None``."""
    where = display_path(Path(parent).expanduser()) if parent else "the cache folder"
    number, text = getattr(error, "errno", None), str(error)
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    if number in full or any(os.strerror(code) in text for code in full):
        return PlanError(
            f"The disk is full: no room in {where} for offloaded weights.",
            "Free some space, or choose another place: --offload-folder DIR",
        )
    denied = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if number in denied:
        return PlanError(f"Nothing can be written to {where}.", "Choose another place: --offload-folder DIR")
    return None


def _base(parent: str) -> Path:
    try:
        return Path(parent).expanduser() if parent else cache_folder() / "offload"
    except RuntimeError:
        raise PlanError(
            f"Nobody is known whose folder {parent} would be.", "Choose another place: --offload-folder DIR"
        ) from None


def _make_private(base: Path) -> Path:
    if os.path.islink(base):  # that of `Path` fails where a name is too long
        raise PlanError(
            f"{display_path(base.parent)}/{base.name} is a link, which an offload folder may not be.",
            "Give the folder itself: --offload-folder DIR",
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=make_private(base)))
        folder.chmod(stat.S_IRWXU)  # mkdtemp gives 0700, less what an unusual umask takes from its owner
        return folder
    except OSError as error:
        raise disk_error(error, str(base)) or PlanError(
            f"No offload folder can be made in {display_path(base)}: {error.strerror}.",
            "Choose another place: --offload-folder DIR",
        ) from None


def _identity(path: Path) -> tuple[int, int]:
    info = path.lstat()
    return info.st_dev, info.st_ino


def _locked(path: Path) -> int | None:
    """A descriptor that holds the folder for this process; ``None`` when another one does, or nobody can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_orphans(base: Path) -> None:
    """Delete what killed processes of this user have left in ``base``."""
    with suppress(OSError):
        for path in base.glob(f"{_PREFIX}*"):
            info = path.lstat()
            is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()
            if not is_ours or time.time() - info.st_mtime < _NEW_S:
                continue
            lock = _locked(path)
            if lock is not None:
                _remove_tree(path, (info.st_dev, info.st_ino), lock)


def _remove_tree(path: Path, identity: tuple[int, int], lock: int | None) -> None:
    """Delete the folder that was made, and nothing that was put in its place."""
    try:
        if _identity(path) == identity and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass
    finally:
        if lock is not None:
            os.close(lock)
