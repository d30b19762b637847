"""RAM that this process may really use: the machine's, cut down to its control groups' limits.

A container sees all of the host's memory in ``/proc/meminfo``, and is killed at its own limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as the largest page-aligned integer


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM: all that may be used, what is free now, and what other processes hold."""

    total: int
    free: int
    other: int = 0


@dataclass(frozen=True)
class GroupMemory:
    """Limit and use of one control group, in bytes. ``used`` leaves out cache that can be dropped."""

    limit: int
    used: int


def host_memory(root: Path = ROOT) -> Memory:
    """RAM of this machine, within the limits of the control groups of this process.

    Free is the smallest of what the kernel calls available and what each group leaves.
    ``root`` is where ``proc`` and ``sys`` are looked up.
    """
    ram = psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    return limited(
        Memory(ram.total, ram.available, max(0, ram.total - ram.available - own)), group_memory(root)
    )


def limited(memory: Memory, groups: tuple[GroupMemory, ...]) -> Memory:
    """``memory`` cut down to ``groups``."""
    total = min([memory.total, *(group.limit for group in groups)])
    free = min([memory.free, *(max(0, group.limit - group.used) for group in groups)])
    return Memory(total, min(free, total), min(memory.other, total - min(free, total)))


def group_memory(root: Path = ROOT) -> tuple[GroupMemory, ...]:
    """Every control group with a memory limit that holds this process, innermost first (v1 and v2)."""
    groups = (_read_group(folder) for folder in _group_folders(root))
    return tuple(group for group in groups if group is not None)


def _group_folders(root: Path) -> Iterator[Path]:
    paths = _group_paths(root)
    for version, mount_root, mount in _group_mounts(root):
        if version not in paths:
            continue
        yield from _from_leaf_to_top(root / mount.lstrip("/"), paths[version], mount_root)


def _from_leaf_to_top(mount: Path, path: str, mount_root: str) -> Iterator[Path]:
    """Folders from the process's group up to the mount.

    Inside a container the path may be the host's, of which only the part below ``mount_root`` is
    visible, or nothing: then the mount itself is the container's group.
    """
    inside = path.removeprefix(mount_root.rstrip("/")) if mount_root != "/" else path
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    leaf = mount.joinpath(*parts)
    if not leaf.is_dir():
        leaf = mount
    yield leaf
    while leaf != mount:
        leaf = leaf.parent
        yield leaf


def _group_paths(root: Path) -> dict[str, str]:
    """``"v1"`` and ``"v2"`` -> path of this process's memory group, from ``/proc/self/cgroup``."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            paths["v2"] = path
        elif "memory" in controllers.split(","):
            paths["v1"] = path
    return paths


def _group_mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """``(version, root of the mount, mount point)`` of the memory controller's hierarchies."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or len(described) < 3:
            continue
        if described[0] == "cgroup2":
            yield "v2", fields[3], fields[4]
        elif described[0] == "cgroup" and "memory" in described[2].split(","):
            yield "v1", fields[3], fields[4]


def _read_group(folder: Path) -> GroupMemory | None:
    if (folder / "memory.max").exists():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        reclaimable = _statistic(folder, "inactive_file")
    else:
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        reclaimable = _statistic(folder, "total_inactive_file")
    if limit is None or limit >= _NO_LIMIT:
        return None
    return GroupMemory(limit, max(0, (used or 0) - reclaimable))


def _statistic(folder: Path, key: str) -> int:
    """One number of ``memory.stat``; file pages that are not in use count as free, as Kubernetes does."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
