"""The folder of re-written weights: private, removed, and not to be led astray."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llm_magic.backends.accelerate.files.offload_folder import (
    OffloadFolder,
    check_tensor_names,
    disk_error,
)
from llm_magic.errors import PlanError, SourceError


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_it_is_new_and_private(tmp_path: Path) -> None:
    first, second = OffloadFolder(str(tmp_path)), OffloadFolder(str(tmp_path))
    assert first.path != second.path
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    (first.path / "weight.safetensors").write_bytes(b"1")
    first.protect()
    assert stat.S_IMODE((first.path / "weight.safetensors").stat().st_mode) == 0o600
    for folder in (first, second, first):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("umask", [0, 0o277])
def test_no_umask_opens_it_or_locks_it(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        folder = OffloadFolder(str(tmp_path))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_the_cache_folder_is_made_private(cache_folder: Path) -> None:
    previous = os.umask(0)
    try:
        OffloadFolder().remove()
    finally:
        os.umask(previous)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (cache_folder, cache_folder / "offload")] == [0o700] * 2


def test_without_a_place_it_is_in_the_cache_folder(cache_folder: Path) -> None:
    folder = OffloadFolder()
    assert folder.path.parent == cache_folder / "offload"
    folder.remove()


def test_it_goes_when_nothing_holds_it(tmp_path: Path) -> None:
    folder = OffloadFolder(str(tmp_path))
    path = folder.path
    assert path.is_dir()
    del folder
    assert not path.exists()


def test_a_link_as_its_place_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "planted").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(PlanError, match="is a link"):
        OffloadFolder(str(tmp_path / "planted"))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "says"),
    [("~nobody-of-this-name/x", "Nobody is known"), ("x" * 5000, "No offload folder can be made")],
)
def test_a_place_that_cannot_be_is_refused(place: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        OffloadFolder(place)
    assert "--offload-folder" in caught.value.next_step


def test_removing_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "thesis.txt").chmod(0o644)
    before = (precious / "thesis.txt").stat().st_mode
    base = tmp_path / "base"

    inside = OffloadFolder(str(base))
    (inside.path / "weight.safetensors").symlink_to(precious / "thesis.txt")
    (inside.path / "folder").symlink_to(precious, target_is_directory=True)
    inside.protect()
    assert (precious / "thesis.txt").stat().st_mode == before
    inside.remove()

    replaced = OffloadFolder(str(base))
    replaced.path.rmdir()
    replaced.path.symlink_to(precious, target_is_directory=True)
    replaced.remove()

    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["a/b", "a\\b", "../weight", "a..b", "nul\0byte"])
def test_names_that_would_leave_the_folder(name: str) -> None:
    with pytest.raises(SourceError, match="unsafe name"):
        check_tensor_names(["model.layers.0.weight", name])


def test_ordinary_names_pass() -> None:
    check_tensor_names(["model.layers.0.mlp.experts.gate_up_proj", "transformer.h.0.attn.c_attn.weight"])


def test_errors_of_the_disk_are_told_from_others(tmp_path: Path) -> None:
    import errno

    full = disk_error(OSError(errno.ENOSPC, "No space left on device"), str(tmp_path))
    assert full is not None
    assert "full" in full.message
    wrapped = disk_error(
        RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    )
    assert wrapped is not None
    denied = disk_error(PermissionError(errno.EACCES, "Permission denied"))
    assert denied is not None
    assert "written" in denied.message
    assert disk_error(ValueError("something else")) is None


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there")
def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    """The folders look two minutes old, as they would; a younger one may not be locked yet."""
    script = (
        "import os, sys, time\n"
        "from llm_magic.backends.accelerate.files.offload_folder import OffloadFolder\n"
        "folder = OffloadFolder(sys.argv[1])\n"
        "(folder.path / 'weights').write_bytes(b'1')\n"
        "os.utime(folder.path, (time.time() - 120,) * 2)\n"
        "print(folder.path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:
        left, kept = (Path(process.stdout.readline().strip()) for process in (killed, living))
        killed.kill()
        killed.wait(60)
        other = tmp_path / "llm-magic-notes.txt"
        other.write_text("mine")
        mine = OffloadFolder(str(tmp_path))
        assert not left.exists()
        assert (kept / "weights").exists()
        assert other.exists()
        mine.remove()
        living.communicate("", 60)
    assert list(tmp_path.iterdir()) == [other]


def test_a_file_has_a_name_that_none_had_before(tmp_path: Path) -> None:
    """Or whoever remembers the one before by its path reads that."""
    folder = OffloadFolder(str(tmp_path))
    names = []
    for _ in range(3):
        path = folder.new_file("model.layers.0")
        path.touch()
        path.unlink()
        names.append(path.name)
    assert names == ["model.layers.0.bin", "model.layers.0.1.bin", "model.layers.0.2.bin"]
    folder.remove()
