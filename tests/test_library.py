"""What is on this computer is listed with what to type, damaged files included."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_magic.backends.accelerate.source.convert import MARK
from llm_magic.backends.accelerate.source.sources import find_starter, resolve
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent
from llm_magic.library import LocalModel, local_models, pull
from llm_magic.model import ModelSpec
from tests.gguf_files import gguf_bytes


def ignore(_event: PhaseEvent) -> None:
    """A progress that nobody watches."""


def listed(kind: str, models: list[LocalModel]) -> list[LocalModel]:
    return [model for model in models if model.kind == kind]


def test_the_starter_is_listed_and_says_when_it_is_converted(
    starter_folder: Path, cache_folder: Path
) -> None:
    [before] = listed("starter", local_models(cache_folder))
    assert (before.source, before.detail) == ("starter", "llama, Q4_1")
    assert before.bytes == find_starter().stat().st_size
    target = resolve(ModelSpec("starter"), ignore).folder
    target.mkdir(parents=True)
    (target / MARK).write_text((starter_folder / MARK).read_text())
    models = local_models(cache_folder)
    assert listed("starter", models)[0].detail == "llama, Q4_1, converted"
    assert listed("gguf", models) == []  # its conversion is not a second model


def test_files_and_folders_of_the_working_folder_are_listed(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(tiny_model("llama"), target_is_directory=True)
    (tmp_path / "good.gguf").write_bytes(gguf_bytes(tensors=[("w", (32,), 8, 0)], data=34))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    empty = tmp_path / "layout-only"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "qwen3"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    webpage = tmp_path / "webpage"
    webpage.mkdir()
    (webpage / "config.json").write_text('{"theme": "dark"}')
    models = local_models()
    assert [(m.source, m.detail) for m in listed("gguf", models)] == [
        ("bad.gguf", "damaged"),
        ("good.gguf", "llama, Q8_0"),
    ]
    folders = {m.name: m for m in listed("folder", models)}
    assert set(folders) == {"llama", "layout-only", "broken"}
    assert folders["llama"].bytes == (tiny_model("llama") / "model.safetensors").stat().st_size
    assert folders["llama"].detail == "llama"
    assert folders["layout-only"].detail == "qwen3, configuration only"
    assert folders["broken"].detail.startswith("damaged configuration")
    assert resolve(ModelSpec(folders["layout-only"].source), ignore).name == "layout-only"


def test_the_working_folder_itself_can_be_a_model(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model("llama"))
    [model] = listed("folder", local_models())
    assert (model.name, model.source) == ("llama", ".")


def test_conversions_of_files_elsewhere_are_listed(tmp_path: Path, cache_folder: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "big.gguf"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(gguf_bytes(tensors=[("w", (32,), 8, 0)], data=34))
    for number, source in enumerate((elsewhere, tmp_path / "gone.gguf")):
        folder = cache_folder / "converted" / str(number)
        folder.mkdir(parents=True)
        (folder / MARK).write_text(json.dumps({"source": str(source)}))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(bytes(10))
    here = tmp_path / "here"
    here.mkdir()
    models = local_models(here)
    [file] = listed("gguf", models)
    assert Path(file.source).expanduser().resolve() == elsewhere.resolve()
    [folder_model] = listed("folder", models)
    assert (folder_model.name, folder_model.bytes) == ("gone", 10)
    assert Path(folder_model.source).expanduser().resolve() == (cache_folder / "converted" / "1").resolve()


def test_a_folder_that_cannot_be_listed_is_no_error(tmp_path: Path, cache_folder: Path) -> None:
    assert listed("folder", local_models(tmp_path / "missing")) == []


def test_listing_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom llm_magic.library import local_models\nlocal_models()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("source", ["starter", "."])
def test_what_is_here_is_not_pulled(source: str) -> None:
    with pytest.raises(SourceError, match="on this computer already"):
        pull(ModelSpec(source), ignore)


def test_what_is_no_hub_id_is_not_pulled() -> None:
    with pytest.raises(SourceError):
        pull(ModelSpec("no such thing"), ignore)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/model", "x" * 5000])
def test_what_cannot_be_a_path_is_not_pulled(source: str) -> None:
    with pytest.raises(SourceError, match="no path that can be read"):
        pull(ModelSpec(source), lambda _: None)
