"""What the host says: control groups, disks, processors, from fixture trees and from this computer."""

from __future__ import annotations

import os
import plistlib
import stat
import sys
from pathlib import Path

import pytest

from llm_magic.host import disk, memory, nvml, processors, speed
from llm_magic.host.memory import GroupMemory, Memory
from llm_magic.units import GIB, MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="sysfs and control groups are Linux's")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file calls")
MOUNT_V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = "34 25 0:31 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
NO_LIMIT_V1 = str(0x7FFFFFFFFFFFF000)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# --- Memory


def test_v2_counts_every_group_up_to_the_mount_and_frees_cache(tmp_path):
    group = "sys/fs/cgroup/user.slice/job"
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            "proc/self/mountinfo": MOUNT_V2.format(root="/"),
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "1000\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
        },
    )
    assert memory.group_memory(tmp_path) == (GroupMemory(4 * GIB, 2 * GIB),)


def test_v2_container_that_does_not_see_its_own_path(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../host/path/of/container\n",
            "proc/self/mountinfo": MOUNT_V2.format(root="/"),
            "sys/fs/cgroup/memory.max": "1073741824\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert memory.group_memory(tmp_path) == (GroupMemory(GIB, 0),)


def test_v1_mounted_at_the_containers_own_group(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "12:pids:/docker/ab\n4:memory,hugetlb:/docker/ab\n0::/\n",
            "proc/self/mountinfo": MOUNT_V1.format(root="/docker/ab"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {256 * MIB}\n",
        },
    )
    assert memory.group_memory(tmp_path) == (GroupMemory(2 * GIB, GIB - 256 * MIB),)


def test_v1_inner_group_without_limit_inside_one_with(tmp_path):
    mount = "sys/fs/cgroup/memory"
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/slurm/job7\n",
            "proc/self/mountinfo": MOUNT_V1.format(root="/"),
            f"{mount}/memory.limit_in_bytes": NO_LIMIT_V1,
            f"{mount}/slurm/memory.limit_in_bytes": str(8 * GIB),
            f"{mount}/slurm/memory.usage_in_bytes": str(5 * GIB),
            f"{mount}/slurm/job7/memory.limit_in_bytes": NO_LIMIT_V1,
        },
    )
    assert memory.group_memory(tmp_path) == (GroupMemory(8 * GIB, 5 * GIB),)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "garbage\n", "proc/self/mountinfo": "garbage\n - \n"},
        {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": MOUNT_V2.format(root="/")},
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": MOUNT_V2.format(root="/"),
            "sys/fs/cgroup/memory.max": "lots\n",
        },
    ],
    ids=["nothing", "garbage", "no files", "no number"],
)
def test_no_limit_where_none_can_be_read(files, tmp_path):
    assert memory.group_memory(tree(tmp_path, files)) == ()


def test_the_tightest_limit_counts():
    groups = (GroupMemory(8 * GIB, 7 * GIB), GroupMemory(4 * GIB, 1 * GIB))
    assert memory.limited(Memory(64 * GIB, 32 * GIB, 20 * GIB), groups) == Memory(4 * GIB, GIB, 3 * GIB)


def test_a_group_over_its_limit_has_nothing_free():
    assert memory.limited(Memory(10, 5), (GroupMemory(4, 6),)).free == 0


def test_memory_of_this_computer():
    now = memory.host_memory()
    assert 0 < now.free <= now.total
    assert 0 <= now.other <= now.total - now.free


# --- Disks


def block(
    root: Path, number: str, name: str, rotational: str = "", parent: str = "block", **files: str
) -> Path:
    """A block device as sysfs shows it: its folder, and the link from its number."""
    folder = root / "sys/devices" / parent / name
    folder.mkdir(parents=True, exist_ok=True)
    if rotational:
        tree(folder, {"queue/rotational": f"{rotational}\n"})
    tree(folder, files)
    for link in (root / "sys/dev/block" / number, root / "sys/class/block" / name.replace("/", "!")):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    return folder


def partition(root: Path, number: str, of: Path) -> Path:
    folder = of / f"{of.name}p1"
    tree(folder, {"partition": "1\n"})
    (root / "sys/dev/block" / number).symlink_to(folder)
    return folder


def made_of(whole: Path, *parts: Path) -> None:
    (whole / "slaves").mkdir()
    for part in parts:
        (whole / "slaves" / part.name).symlink_to(part)


def named(root: Path, major: int, minor: int, path: str = "/data") -> str:
    return disk.linux_disk_name(os.makedev(major, minor), path, root)


@linux
@pytest.mark.parametrize(
    ("name", "rotational", "files", "kind"),
    [
        ("nvme0n1", "0", {}, "NVMe SSD"),
        ("sda", "0", {"device/model": "Samsung SSD 870\n"}, "SSD"),
        ("sdb", "1", {"device/model": "WDC WD40EFRX\n"}, "HDD"),
        ("sdc", "1", {"device/model": "QEMU HARDDISK\n"}, "Virtual disk"),
        ("vda", "1", {}, "Virtual disk"),
        ("mmcblk0", "0", {}, "SD card or eMMC"),
        ("zram0", "0", {}, "RAM disk (zram)"),
        ("sdd", "", {}, "Disk"),
    ],
)
def test_kinds_of_drives(name, rotational, files, kind, tmp_path):
    block(tmp_path, "8:0", name, rotational, **files)
    assert named(tmp_path, 8, 0) == kind


@linux
def test_partition_of_an_encrypted_volume_on_a_drive(tmp_path):
    drive = block(tmp_path, "259:0", "nvme0n1", "0")
    volume = block(tmp_path, "253:0", "dm-0", "0")
    made_of(volume, partition(tmp_path, "259:1", drive))
    assert named(tmp_path, 259, 1) == "NVMe SSD"
    assert named(tmp_path, 253, 0) == "NVMe SSD"


@linux
def test_a_volume_is_as_slow_as_its_slowest_drive(tmp_path):
    fast, slow = block(tmp_path, "8:0", "sda", "0"), block(tmp_path, "8:16", "sdb", "1")
    inner = block(tmp_path, "9:0", "md0", "1")
    made_of(inner, fast, slow)
    outer = block(tmp_path, "253:0", "dm-0", "1")
    made_of(outer, inner)
    assert named(tmp_path, 253, 0) == "HDD"


@linux
@pytest.mark.parametrize(
    ("mount", "kind"),
    [
        ("29 1 0:40 / / rw - overlay overlay rw\n30 29 0:40 / /data rw - nfs4 server:/export rw\n", "Network disk (nfs4)"),
        ("30 29 0:40 / /data rw - tmpfs tmpfs rw\n", "RAM disk (tmpfs)"),
        ("30 29 0:40 / /data rw - btrfs /dev/sda rw\n", "SSD"),
        ("30 29 0:40 / /da rw - tmpfs tmpfs rw\n", "Disk"),
        ("30 29 0:40 / / rw - overlay overlay rw\n", "Disk"),
        ("", "Disk"),
    ],
    ids=["nfs", "tmpfs", "btrfs", "a name that only begins alike", "overlay", "unknown"],
)  # fmt: skip
def test_filesystems_without_a_device_of_their_own(mount, kind, tmp_path):
    block(tmp_path, "8:0", "sda", "0")
    tree(tmp_path, {"proc/self/mountinfo": mount})
    assert named(tmp_path, 0, 40, "/data/models") == kind


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"SolidState": True, "BusProtocol": "Apple Fabric"}, "NVMe SSD"),
        ({"SolidState": True, "BusProtocol": "SATA"}, "SSD"),
        ({"SolidState": False}, "HDD"),
        ({}, "Disk"),
    ],
)
def test_macos(facts, kind):
    assert disk.macos_disk_name(plistlib.dumps(facts)) == kind


def test_macos_without_an_answer():
    assert disk.macos_disk_name(b"") == "Disk"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("SSD|NVMe\r\n", "NVMe SSD"),
        ("SSD|SATA", "SSD"),
        ("HDD|USB", "HDD"),
        ("Unspecified|SAS", "Disk"),
        ("", "Disk"),
    ],
)
def test_windows(answer, kind):
    assert disk.windows_disk_name(answer) == kind


def test_room_of_a_folder_that_does_not_exist_yet(tmp_path):
    there, not_there = disk.disk_under(tmp_path), disk.disk_under(tmp_path / "a" / "b")
    assert there.name
    assert (there.key, there.total) == (not_there.key, not_there.total)
    assert 0 < there.free <= there.total


@posix
def test_read_speed_is_measured_and_leaves_nothing_behind(tmp_path):
    measured = disk.measure_read((tmp_path / "later", tmp_path), size=16 * MIB, budget_s=0.2)
    assert measured is not None
    assert measured.bytes_per_s > 1e6
    assert "reads" in measured.method
    assert list(tmp_path.iterdir()) == []


@posix
def test_file_of_the_measurement_is_private_and_nameless(tmp_path):
    with disk._nameless_file(tmp_path) as (writer, _reader, _method):
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(os.fstat(writer).st_mode) == 0o600


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_gives_no_speed(tmp_path):
    tmp_path.chmod(0o500)
    assert disk.measure_read((tmp_path,), size=16 * MIB) is None


@linux
def test_folder_that_takes_no_file_gives_no_speed():
    assert disk.measure_read((Path("/proc/self"),), size=16 * MIB) is None


# --- Processors


def test_cpu_name_on_linux(tmp_path):
    tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD  EPYC 9654\n\nmodel name : other\n"})
    assert processors._linux_cpu_name(tmp_path) == "AMD  EPYC 9654"
    assert processors._linux_cpu_name(tmp_path / "nothing") == ""


def test_cpu_of_this_computer():
    assert processors.cpu_name().strip()
    assert processors.cpu_cores() >= 1


def test_last_caches_of_a_cpu_are_counted_once_for_who_shares_them(tmp_path):
    """Two chiplets, each with a cache of 32 MiB for its two cores."""
    for cpu in range(4):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
        shared = "0-1" if cpu < 2 else "2-3"
        for index, (level, size, sharers) in enumerate(
            [("1", "32K", cpu), ("2", "1024K", cpu), ("3", "32768K", shared)]
        ):
            text = {"level": level, "size": size, "shared_cpu_list": str(sharers)}
            tree(tmp_path, {f"{folder}/index{index}/{name}": f"{value}\n" for name, value in text.items()})
    assert processors.cpu_cache_bytes(tmp_path) == 64 * MIB
    assert processors.cpu_cache_bytes(tmp_path / "nothing") == 0


def test_npus_by_their_drivers(tmp_path):
    for number, driver in enumerate(("intel_vpu", "amdxdna", "brand_new")):
        device = tmp_path / f"sys/class/accel/accel{number}/device"
        device.mkdir(parents=True)
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    (tmp_path / "sys/class/accel/accel3").mkdir()
    assert processors.linux_npu_names(tmp_path) == ("Intel NPU", "AMD XDNA NPU", "NPU (brand_new)", "NPU")


def test_no_npus(tmp_path):
    assert processors.linux_npu_names(tmp_path) == ()


def test_tools_that_are_missing_or_fail_say_nothing():
    assert processors.run("no-such-tool-anywhere") == ""
    assert processors.run(sys.executable, "-c", "print('x'); raise SystemExit(3)") == ""
    assert processors.run(sys.executable, "-c", "print(' x ')") == "x"


# --- Speed and driver


def test_cpu_speed_is_measured():
    measured = speed.measure_cpu(GIB, budget_s=0.05)
    assert measured is not None
    assert measured.read_bytes_per_s > 1e8
    assert measured.flops > 1e8
    assert "numpy" in measured.method


def test_cpu_speed_needs_room():
    assert speed.measure_cpu(8 * MIB) is None


def test_best_of_runs_once_to_warm_up_and_twice_to_time():
    runs: list[int] = []
    assert speed.best_of(lambda: runs.append(1), 0.0) > 0
    assert len(runs) == 3


def test_driver_answers_or_is_not_there():
    for gpu in nvml.gpus():
        assert 0 <= gpu.free <= gpu.total
        assert 0 <= gpu.other <= gpu.total - gpu.free
