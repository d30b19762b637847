"""`%llm doctor`: tables of versions, builds, folders and environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llm_magic import doctor
from llm_magic.doctor import REQUIREMENTS, Finding, diagnose, judge_version
from llm_magic.units import GIB

BY_NAME = {requirement.package: requirement for requirement in REQUIREMENTS}


@pytest.mark.parametrize(
    ("package", "hole", "closed"),
    [
        ("jupyterlab", "4.6.1", "4.6.2"),
        ("notebook", "7.5.5", "7.5.6"),
        ("jupyter_server", "2.19.3", "2.20"),
        ("nbconvert", "7.17.0", "7.17.1"),
        ("ipython", "9.15.0", "9.16"),
        ("torch", "2.9.1+cpu", "2.10"),
    ],
)
def test_known_holes_are_named_up_to_the_version_that_closed_them(
    package: str, hole: str, closed: str
) -> None:
    finding = judge_version(BY_NAME[package], hole)
    assert finding.level == "problem"
    assert "security" in finding.what
    assert f"{package}>={closed}" in finding.next_step
    assert judge_version(BY_NAME[package], closed) == Finding("ok", f"{package} {closed}")


@pytest.mark.parametrize(
    ("package", "found", "level"),
    [
        ("transformers", "5.16.9", "problem"),
        ("transformers", "5.17.0", "ok"),
        ("transformers", "5.23.0.dev0", "ok"),
        ("transformers", "6.0.0", "problem"),
        ("accelerate", "1.14.1", "problem"),
        ("accelerate", "1.15.0", "ok"),
        ("ipykernel", "7.2.0", "problem"),
        ("ipykernel", "7.4.0", "ok"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.14.0+cu130", "ok"),
        ("torch", "2.10.0a0+git1234567", "problem"),
        ("torch", "main-build", "warning"),
    ],
)
def test_supported_ranges(package: str, found: str, level: str) -> None:
    assert judge_version(BY_NAME[package], found).level == level


def test_a_missing_package_is_a_problem_only_when_it_is_needed() -> None:
    findings = list(doctor.check_versions(lambda _package: None))
    assert {f.what.split()[0] for f in findings} == {"torch", "transformers", "accelerate", "ipython"}
    assert all(f.level == "problem" and f.next_step.startswith("%pip install") for f in findings)


@pytest.mark.parametrize(
    ("torch_version", "driver", "level"),
    [
        ("2.13.0+cpu", True, "problem"),
        ("2.13.0+cpu", False, "ok"),
        ("2.13.0+cu130", True, "ok"),
        ("2.13.0", True, "ok"),
        ("2.13.0", False, "ok"),
    ],
)
def test_a_cpu_build_beside_an_nvidia_driver_is_a_problem(
    torch_version: str, driver: bool, level: str
) -> None:
    finding = doctor.check_torch_build(torch_version, driver)
    assert finding.level == level
    assert bool(finding.next_step) == (level == "problem")


def test_a_folder_that_is_a_file_is_a_problem_and_a_missing_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    blocked, possible = doctor.check_folders((tmp_path / "taken" / "cache", tmp_path / "new" / "cache"))
    assert (blocked.level, blocked.what) == ("problem", "The folder taken/cache cannot be written.")
    assert "LLM_MAGIC_CACHE" in blocked.next_step
    assert possible.level != "problem"
    assert possible.what.startswith(("new/cache", "Little room for models in new/cache"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("free", "level"), [(5 * GIB, "ok"), (5 * GIB - 1, "warning")])
def test_little_disk(free: int, level: str) -> None:
    assert doctor.judge_free_disk("~/models", free).level == level


@pytest.mark.parametrize(("available", "level"), [(2 * GIB, "ok"), (2 * GIB - 1, "warning")])
def test_little_ram(available: int, level: str) -> None:
    assert doctor.check_memory(available).level == level


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_mode_is_named(value: str, tmp_path: Path) -> None:
    findings = list(doctor.check_hub({"HF_HUB_OFFLINE": value}, tmp_path))
    assert (findings[0].level, "HF_HUB_OFFLINE" in findings[0].next_step) == ("warning", True)
    assert [f.level for f in doctor.check_hub({"HF_HUB_OFFLINE": "0"}, tmp_path)] == ["ok"]


def test_a_token_is_noticed_and_never_shown(tmp_path: Path) -> None:
    secret = "hf_canaryCANARY"
    (tmp_path / "token").write_text(secret)
    for environment in (
        {"HF_TOKEN": secret},
        {"HF_HOME": str(tmp_path)},
        {"HF_TOKEN_PATH": str(tmp_path / "token")},
    ):
        (finding,) = doctor.check_hub(environment, tmp_path / "home")
        assert finding.what == "Hugging Face token: set"
    (finding,) = doctor.check_hub({}, tmp_path / "home")
    assert "none" in finding.what


@pytest.mark.parametrize(
    ("modules", "front_end"),
    [
        ((), "terminal"),
        (("ipykernel.zmqshell",), "Jupyter"),
        (("ipykernel.zmqshell", "google.colab"), "Colab"),
    ],
)
def test_front_ends(modules: tuple[str, ...], front_end: str) -> None:
    assert front_end in doctor.check_front_end(dict.fromkeys(modules)).what


def test_a_failed_plugin_is_named_before_everything_that_is_well() -> None:
    findings = diagnose(["shouty: ImportError: no module named shout"])
    named = next(f for f in findings if "shouty" in f.what)
    assert named.level == "problem"
    assert "ImportError" in named.what
    levels = [f.level for f in findings]
    assert levels == sorted(levels, key=["problem", "warning", "ok"].index)


def test_this_environment_is_well_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from llm_magic.doctor import diagnose; f = diagnose();"
        "assert not [x for x in f if x.level == 'problem' and 'torch' not in x.what], f;"
        "print(sorted({'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_finding_holds_a_path_of_this_computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_MAGIC_CACHE", str(tmp_path / "canary" / "cache"))
    assert not [f for f in diagnose() if str(tmp_path) in f.what + f.next_step]


def test_live_views_that_cannot_be_shown_are_named(tmp_path: Path) -> None:
    module = tmp_path / "views.js"
    assert doctor.check_views(module, has_host=False).level == "warning"
    assert "not built" in doctor.check_views(module, has_host=True).what
    module.touch()
    assert doctor.check_views(module, has_host=True).level == "ok"
