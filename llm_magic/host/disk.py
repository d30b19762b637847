"""The disk under a folder: room, kind (NVMe, SSD, HDD, network, RAM), and how fast it really reads."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import plistlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llm_magic.host.processors import powershell, run
from llm_magic.host.system_files import text_of
from llm_magic.units import GIB, MIB

ROOT = Path("/")
CHUNK_BYTES = 8 * MIB
_READERS = 4  # a single thread leaves a fast disk waiting
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "glusterfs", "fuse.sshfs")
_IN_MEMORY = ("tmpfs", "ramfs", "zram")
_F_NOCACHE = 48  # macOS fcntl command: this descriptor neither fills nor uses the page cache


@dataclass(frozen=True)
class Disk:
    """The disk under a folder. ``name`` is its kind; ``key`` tells disks of one machine apart."""

    name: str
    total: int
    free: int
    key: str


@dataclass(frozen=True)
class ReadSpeed:
    """Sequential reads, in bytes per second, and how they were measured."""

    bytes_per_s: float
    method: str


def disk_key(folder: Path) -> str:
    """What tells the disk under ``folder`` from others of this machine, cheap to find."""
    return f"{nearest_folder(folder).stat().st_dev:x}"


def disk_under(folder: Path, name: str | None = None) -> Disk:
    """Room of the disk under ``folder``, which need not exist yet; its kind, unless ``name`` says it."""
    place = nearest_folder(folder)
    usage = shutil.disk_usage(place)
    return Disk(
        disk_name(place.resolve()) if name is None else name, usage.total, usage.free, disk_key(place)
    )


def nearest_folder(folder: Path) -> Path:
    """``folder``, or the closest parent that exists."""
    absolute = folder.expanduser().absolute()
    return next((path for path in (absolute, *absolute.parents) if path.is_dir()), Path(absolute.anchor))


def disk_name(folder: Path) -> str:
    """``"NVMe SSD"``, ``"SSD"``, ``"HDD"``, ``"Network disk"``…; ``"Disk"`` when the system does not say."""
    system = platform.system()
    if system == "Linux":
        return linux_disk_name(os.stat(folder).st_dev, str(folder))
    if system == "Darwin":
        return _macos_disk_name(folder)
    return _windows_disk_name(folder) if system == "Windows" else "Disk"


# --- Linux: sysfs, through partitions, encryption, LVM and RAID down to the drives


def linux_disk_name(device_number: int, path: str, root: Path = ROOT) -> str:
    """Kind of the disk that holds ``path``, whose ``st_dev`` is ``device_number``.

    ``root`` is where ``proc`` and ``sys`` are looked up.
    """
    number = f"{os.major(device_number)}:{os.minor(device_number)}"
    filesystem, source = _mount_of(path, number, root)
    if filesystem in _IN_MEMORY:
        return f"RAM disk ({filesystem})"
    if filesystem in _NETWORK:
        return f"Network disk ({filesystem})"
    block = root / "sys/dev/block" / number
    if not block.exists() and source.startswith("/dev/"):  # btrfs and overlays number their own devices
        block = root / "sys/class/block" / source.removeprefix("/dev/").replace("/", "!")
    return _block_name(block.resolve()) if block.exists() else "Disk"


def _block_name(block: Path) -> str:
    """Kind of one block device; of the slowest drive where it is made of several."""
    drives = sorted({_drive_name(drive) for drive in _drives(block)}, key=_slowest_first)
    return drives[0] if drives else "Disk"


def _drives(block: Path) -> Iterator[Path]:
    if (block / "partition").exists():
        block = block.parent
    slaves = block / "slaves"
    parts = sorted(slaves.iterdir()) if slaves.is_dir() else []
    if not parts:
        yield block
    for part in parts:
        yield from _drives(part.resolve())


def _drive_name(block: Path) -> str:
    name, model = block.name, text_of(block / "device/model")
    if name.startswith("zram"):
        return "RAM disk (zram)"
    if name.startswith(("vd", "xvd")) or re.search("virtual|qemu|vbox", model, re.IGNORECASE):
        return "Virtual disk"  # what it reports of its rotation is the hypervisor's default
    if name.startswith("nvme"):
        return "NVMe SSD"
    if name.startswith("mmcblk"):
        return "SD card or eMMC"
    return {"0": "SSD", "1": "HDD"}.get(text_of(block / "queue/rotational"), "Disk")


def _slowest_first(name: str) -> tuple[int, str]:
    order = ("HDD", "SD card or eMMC", "Disk", "Virtual disk", "SSD", "NVMe SSD")
    return (order.index(name) if name in order else len(order)), name


def _mount_of(path: str, number: str, root: Path) -> tuple[str, str]:
    """Filesystem and source of the mount with this device number, the one nearest to ``path``."""
    found = ("", "", "")
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or len(described) < 2 or fields[2] != number:
            continue
        point = fields[4].replace("\\040", " ")
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(found[0]):
            found = (point, described[0], described[1])
    return found[1], found[2]


# --- macOS and Windows: their own tools


def _macos_disk_name(folder: Path) -> str:
    device = run("df", "-P", str(folder)).splitlines()[-1:]
    details = run("diskutil", "info", "-plist", device[0].split()[0]) if device else ""
    return macos_disk_name(details.encode())


def macos_disk_name(plist: bytes) -> str:
    """Kind of a disk, from the property list of ``diskutil info -plist``."""
    try:
        facts = plistlib.loads(plist)
    except (ValueError, plistlib.InvalidFileException):
        return "Disk"
    if not facts.get("SolidState"):
        return "HDD" if "SolidState" in facts else "Disk"
    bus = str(facts.get("BusProtocol", ""))
    return "NVMe SSD" if bus in ("Apple Fabric", "PCI-Express") else "SSD"


def _windows_disk_name(folder: Path) -> str:
    letter = folder.drive.rstrip(":")
    if not re.fullmatch("[A-Za-z]", letter):
        return "Network disk"
    script = (
        f"$n = (Get-Partition -DriveLetter {letter}).DiskNumber; "
        'Get-PhysicalDisk | Where-Object DeviceId -eq $n | ForEach-Object { "$($_.MediaType)|$($_.BusType)" }'
    )
    return windows_disk_name(powershell(script))


def windows_disk_name(answer: str) -> str:
    """Kind of a disk, from the ``MediaType|BusType`` of ``Get-PhysicalDisk``."""
    media, _, bus = answer.strip().partition("|")
    if bus == "NVMe":
        return "NVMe SSD"
    return media if media in ("SSD", "HDD") else "Disk"


# --- Speed


def measure_read(
    folders: tuple[Path, ...], *, size: int = 256 * MIB, budget_s: float = 0.8
) -> ReadSpeed | None:
    """Sequential read speed of the disk under ``folders[0]``, past the page cache.

    A file of at most ``size`` bytes is written for at most ``budget_s`` seconds and read for as
    long, in the first of ``folders`` on that disk that takes it. Only this process can read it, and
    it has no name from before its first byte, so that nothing is left behind.

    ``None`` where the page cache cannot be passed by (Windows) or nothing can be written.
    """
    if os.name != "posix":
        return None
    disk = disk_key(folders[0])
    for folder in dict.fromkeys(nearest_folder(folder) for folder in folders):
        if disk_key(folder) != disk or shutil.disk_usage(folder).free < 2 * size + GIB:
            continue
        try:
            return _measure_in(folder, size, budget_s)
        except OSError:
            continue
    return None


def _measure_in(folder: Path, size: int, budget_s: float) -> ReadSpeed | None:
    with _nameless_file(folder) as (writer, reader, method):
        written = _write(writer, size, budget_s)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
        speed = _read(reader, written, budget_s)
    return ReadSpeed(speed, method) if speed else None


@contextmanager
def _nameless_file(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Two descriptors of a new file without a name: one to write, one that reads from the drive itself."""
    writer, name = tempfile.mkstemp(prefix=".llm-magic-", dir=folder)  # 0600
    try:
        reader, method = _open_uncached(name)
    except OSError:
        os.close(writer)
        raise
    finally:
        os.unlink(name)
    try:
        yield writer, reader, method
    finally:
        os.close(writer)
        os.close(reader)


def _open_uncached(name: str) -> tuple[int, str]:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        reader = os.open(name, os.O_RDONLY | direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct, reader = 0, os.open(name, os.O_RDONLY)
    if direct:
        return reader, "direct reads"
    if platform.system() == "Darwin":
        import fcntl

        fcntl.fcntl(reader, _F_NOCACHE, 1)
    return reader, "reads after dropping the page cache"


def _write(descriptor: int, size: int, budget_s: float) -> int:
    chunk = os.urandom(CHUNK_BYTES)  # random, so that no filesystem compresses it
    written, end = 0, time.perf_counter() + budget_s
    while written < size and (written == 0 or time.perf_counter() < end):
        view = memoryview(chunk)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        written += CHUNK_BYTES
    return written


def _read(descriptor: int, size: int, budget_s: float) -> float:
    """Bytes per second of several threads, as an engine reads; 0 when nothing could be read.

    Direct reads need an aligned buffer, which ``mmap`` gives, and are up to three times as fast into
    huge pages. Each thread reads its first chunk once more than counts: the system hands out the
    pages of a buffer when they are first written to.
    """
    length = max(size // _READERS // CHUNK_BYTES, 1) * CHUNK_BYTES
    starts = range(0, max(size - length, 0) + 1, length)
    with ThreadPoolExecutor(len(starts)) as pool:
        ready = threading.Barrier(len(starts) + 1)
        counts = [pool.submit(_read_part, descriptor, (at, length), budget_s, ready) for at in starts]
        try:
            ready.wait()
        except threading.BrokenBarrierError:  # a thread could not even begin
            return 0.0
        began = time.perf_counter()
        done = sum(count.result() for count in counts)
        elapsed = time.perf_counter() - began
    return done / elapsed if elapsed > 0 else 0.0


def _read_part(descriptor: int, part: tuple[int, int], budget_s: float, ready: threading.Barrier) -> int:
    start, length = part
    with mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as view:
        with suppress(AttributeError, OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        try:
            _read_at(descriptor, view, start)
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        done, began = 0, time.perf_counter()
        while done < length and (done == 0 or time.perf_counter() - began < budget_s):
            count = _read_at(descriptor, view, start + done)
            if count <= 0:
                break
            done += count
    return done


def _read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Bytes read; macOS knows no ``preadv``, and needs no aligned buffer."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    return len(os.pread(descriptor, len(view), offset))
