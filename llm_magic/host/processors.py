"""Names of the processors: the CPU, and neural processors beside it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from llm_magic.host.system_files import text_of

ROOT = Path("/")
_COMMAND_TIMEOUT_S = 20
_NPU_DRIVERS = {
    "intel_vpu": "Intel NPU",
    "amdxdna": "AMD XDNA NPU",
    "habanalabs": "Intel Gaudi",
    "qaic": "Qualcomm Cloud AI",
    "rocket": "Rockchip NPU",
    "ethosu": "Arm Ethos-U NPU",
}
_WINDOWS_CPU_KEY = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
_WINDOWS_NPUS = (
    "Get-CimInstance Win32_PnPEntity -Filter \"PNPClass='ComputeAccelerator'\" | ForEach-Object Name"
)


def cpu_name(root: Path = ROOT) -> str:
    """The CPU as it is sold (``"AMD EPYC 9654"``); its architecture where the system does not say."""
    if platform.system() == "Darwin":
        name = run("sysctl", "-n", "machdep.cpu.brand_string")
    elif platform.system() == "Windows":
        name = _windows_cpu_name()
    else:
        name = _linux_cpu_name(root)
    return " ".join((name or platform.processor() or platform.machine() or "CPU").split())


def cpu_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, cores)


def cpu_cache_bytes(root: Path = ROOT) -> int:
    """All last-level caches of the CPU together, also those that a virtual machine shares; 0 where Linux does not say."""
    caches = dict[tuple[int, str], int]()
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size, sharers = (text_of(folder / name) for name in ("level", "size", "shared_cpu_list"))
        if level.isdecimal() and size.removesuffix("K").isdecimal():
            caches[int(level), sharers] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in caches), default=0)
    return sum(count for (level, _), count in caches.items() if level == last)


def npu_names(root: Path = ROOT) -> tuple[str, ...]:
    """Neural processors that the system knows, by name; usually none."""
    system = platform.system()
    if system == "Darwin":
        return ("Apple Neural Engine",) if platform.machine() == "arm64" else ()
    if system == "Windows":
        return tuple(filter(None, map(str.strip, powershell(_WINDOWS_NPUS).splitlines())))
    return linux_npu_names(root)


def linux_npu_names(root: Path = ROOT) -> tuple[str, ...]:
    """Compute accelerators that Linux lists in ``/sys/class/accel``, named by their drivers."""
    folder = root / "sys/class/accel"
    devices = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple(_npu_name(device / "device") for device in devices)


def run(*command: str) -> str:
    """Standard output of a system tool; empty when it is missing, fails or takes too long."""
    executable = shutil.which(command[0])
    if executable is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 (a tool of the system, with fixed arguments)
            [executable, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def powershell(script: str) -> str:
    """Standard output of a PowerShell script; empty when it fails."""
    return run("powershell", "-NoProfile", "-NonInteractive", "-Command", script)


def _npu_name(device: Path) -> str:
    try:
        driver = (device / "driver").resolve(strict=True).name
    except OSError:
        driver = ""
    return _NPU_DRIVERS.get(driver, f"NPU ({driver})" if driver else "NPU")


def _linux_cpu_name(root: Path) -> str:
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:  # only the first core: the kernel makes this file slowly
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "cpu model"):
                    return value.strip()
    except OSError:
        pass
    return ""


def _windows_cpu_name() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _WINDOWS_CPU_KEY) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
    except OSError:
        return ""
