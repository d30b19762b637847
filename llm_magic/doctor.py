"""``%llm doctor``: what on this computer keeps models from loading or running well, and what to do about it.

Every check reads facts that are cheap to get (package metadata, files, the environment) and imports
none of the libraries it judges. Nothing here uses the network.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from llm_magic.folders import VIEWS, cache_folder, data_folder, display_path
from llm_magic.units import GIB, format_bytes

Level = Literal["ok", "warning", "problem"]

LOW_DISK_BYTES = 5 * GIB
LOW_RAM_BYTES = 2 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``next_step`` says what to do, with the command where there is one; empty when all is well.
    """

    level: Level
    what: str
    next_step: str = ""


@dataclass(frozen=True)
class Requirement:
    """A package that must, or may, be here.

    Attributes
    ----------
    supported
        Versions that this release of llm_magic works with.
    safe_from
        First version without the known security holes; empty when none is known.
    required
        Whether llm_magic cannot work without it.
    """

    package: str
    supported: str = ""
    safe_from: str = ""
    required: bool = False


REQUIREMENTS = (
    Requirement("torch", ">=2.10", safe_from="2.10", required=True),
    Requirement("transformers", ">=5.17,<6", required=True),
    Requirement("accelerate", ">=1.15", required=True),
    Requirement("ipython", ">=9.16", safe_from="9.16", required=True),
    Requirement("ipykernel", ">=7.4"),
    Requirement("jupyterlab", safe_from="4.6.2"),
    Requirement("notebook", safe_from="7.5.6"),
    Requirement("jupyter_server", safe_from="2.20"),
    Requirement("nbconvert", safe_from="7.17.1"),
)


def diagnose(failed_plugins: Iterable[str] = ()) -> tuple[Finding, ...]:
    """Look at everything; problems first, then warnings, then what is well.

    Parameters
    ----------
    failed_plugins
        The plugins that did not load, each as ``"name: error"``.
    """
    findings = [
        *check_versions(installed_version),
        check_torch_build(installed_version("torch") or "", has_nvidia_driver()),
        *check_folders((cache_folder(), data_folder())),
        check_memory(psutil.virtual_memory().available),
        *check_hub(os.environ, Path.home()),
        check_front_end(sys.modules),
        check_views(VIEWS, find_spec("anywidget") is not None),
        *check_plugins(failed_plugins),
    ]
    order: dict[Level, int] = {"problem": 0, "warning": 1, "ok": 2}
    return tuple(sorted(findings, key=lambda finding: order[finding.level]))


def installed_version(package: str) -> str | None:
    """Version of an installed package from its metadata, without importing it; ``None`` without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """One finding for each package of ``REQUIREMENTS`` that is installed or should be."""
    for requirement in REQUIREMENTS:
        found = installed(requirement.package)
        if found is not None:
            yield judge_version(requirement, found)
        elif requirement.required:
            yield Finding(
                "problem", f"{requirement.package} is not installed.", _install(requirement, upgrade=False)
            )


def judge_version(requirement: Requirement, found: str) -> Finding:
    """Hold one installed version against what is supported and what is safe."""
    package = requirement.package
    try:
        parsed = Version(found)
    except InvalidVersion:
        return Finding(
            "warning", f"{package} has a version that cannot be read: {found!r}.", _install(requirement)
        )
    # A release candidate of a supported version counts as that version; a local suffix (+cpu) says nothing.
    if requirement.safe_from and parsed < Version(requirement.safe_from):
        return Finding(
            "problem",
            f"{package} {parsed} has known security holes, closed in {requirement.safe_from}.",
            _install(requirement),
        )
    if not SpecifierSet(requirement.supported).contains(parsed.public, prereleases=True):
        return Finding(
            "problem",
            f"{package} {parsed} is outside the supported range {requirement.supported}.",
            _install(requirement),
        )
    return Finding("ok", f"{package} {parsed}")


def check_torch_build(torch_version: str, nvidia_driver: bool) -> Finding:
    """Whether PyTorch can see the NVIDIA GPU that the driver is there for.

    The build is read from the version's suffix (``+cpu``), which is all that its metadata says.
    """
    is_cpu_build = torch_version.endswith("+cpu")
    if nvidia_driver and is_cpu_build:
        return Finding(
            "problem",
            f"This computer has an NVIDIA driver, but torch {torch_version} is built for the CPU only.",
            "Install the CUDA build of the same version: pytorch.org/get-started/locally has the command.",
        )
    if nvidia_driver:
        return Finding("ok", "NVIDIA driver found; torch is not a CPU-only build")
    return Finding("ok", "no NVIDIA driver: models run on the CPU, or on what else torch finds")


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded (Linux) or installed (Windows)."""
    if sys.platform == "win32":
        return ctypes.util.find_library("nvcuda") is not None
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def check_folders(folders: Iterable[Path]) -> Iterator[Finding]:
    """Whether each folder can be written, or made, and has room on its disk."""
    for folder in folders:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        shown = display_path(folder)
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            variable = "LLM_MAGIC_DATA" if folder == data_folder() else "LLM_MAGIC_CACHE"
            yield Finding(
                "problem",
                f"The folder {shown} cannot be written.",
                f"Make it writable, or name another one in the environment variable {variable}.",
            )
            continue
        yield judge_free_disk(shown, shutil.disk_usage(nearest).free)


def judge_free_disk(shown: str, free_bytes: int) -> Finding:
    """Whether the disk under a folder has room for a converted or downloaded model."""
    text = f"{shown}: {format_bytes(free_bytes)} free"
    if free_bytes >= LOW_DISK_BYTES:
        return Finding("ok", text)
    return Finding(
        "warning", f"Little room for models in {text}.", "Free some space: %llm models lists what is there."
    )


def check_memory(available_bytes: int) -> Finding:
    """Whether there is RAM for more than the smallest models."""
    text = f"RAM: {format_bytes(available_bytes)} available"
    if available_bytes >= LOW_RAM_BYTES:
        return Finding("ok", text)
    return Finding(
        "warning", text, "Close other programs or kernels: most models will be read from disk as it is."
    )


def check_hub(environment: Mapping[str, str], home: Path) -> Iterator[Finding]:
    """Whether the hub may be reached, and whether a token is set. The token itself is never read."""
    offline = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_true(environment.get(n, ""))]
    if offline:
        yield Finding(
            "warning",
            f"{offline[0]} is set: only models that are on this computer can be loaded.",
            f"To reach the hub, unset {offline[0]} and restart the kernel.",
        )
    hub_home = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface")
    token_file = Path(environment.get("HF_TOKEN_PATH") or hub_home / "token")
    if environment.get("HF_TOKEN") or token_file.exists():
        yield Finding("ok", "Hugging Face token: set")
    else:
        yield Finding(
            "ok", "Hugging Face token: none (only gated and private models need one: hf auth login)"
        )


def check_front_end(modules: Mapping[str, object]) -> Finding:
    """Which kind of shell runs this, as far as a kernel can know."""
    if "google.colab" in modules:
        return Finding("ok", "front end: Colab")
    if "ipykernel.zmqshell" in modules or "ipykernel.kernelapp" in modules:
        return Finding("ok", "front end: a Jupyter kernel")
    return Finding("ok", "front end: a terminal")


def check_views(module: Path, has_host: bool) -> Finding:
    """Whether notebooks can show live views: they were built, and their host is installed."""
    if not has_host:
        return Finding(
            "warning", "anywidget is missing: views in notebooks do not move", "pip install anywidget"
        )
    if not module.exists():
        return Finding(
            "warning",
            "the live views were not built: views in notebooks do not move",
            "pip install . in the checkout",
        )
    return Finding("ok", "live views of notebooks: built")


def check_plugins(failed_plugins: Iterable[str]) -> Iterator[Finding]:
    """The plugins that did not load, each with its error."""
    for failure in failed_plugins:
        yield Finding(
            "problem",
            f"A plugin failed: {failure}",
            "Update or remove its package, which %llm plugins names; everything else works without it.",
        )


def _install(requirement: Requirement, *, upgrade: bool = True) -> str:
    wanted = requirement.supported or f">={requirement.safe_from}"
    flag = "--upgrade " if upgrade else ""
    return f'%pip install {flag}"{requirement.package}{wanted}", then restart the kernel.'


def _is_true(text: str) -> bool:
    return text.strip().upper() in {"1", "ON", "YES", "TRUE"}
