"""The backend's door: what it accepts, and how light it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_magic.backends.accelerate import plugin
from llm_magic.backends.accelerate.backend import TransformersBackend
from llm_magic.hookspecs import Backend
from llm_magic.model import ModelSpec


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        ("starter", True),
        ("org/model", True),
        ("gpt2", True),
        ("model.gguf", True),
        ("~/models/model.gguf", True),
        ("http://host/model", False),
        ("./no/such/folder", True),
        ("", True),
        ("~nobody-of-this-name/model", True),
        ("x" * 5000, True),
        ("x/" * 5000, True),
        ("a\0b", True),
    ],
)
def test_what_it_accepts_by_its_look(source: str, accepted: bool) -> None:
    assert (TransformersBackend().accepts(ModelSpec(source)) > 0) == accepted


def test_a_model_folder_is_made_for_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    backend = TransformersBackend()
    assert backend.accepts(ModelSpec(str(tiny_model("llama")))) > backend.accepts(ModelSpec(str(tmp_path)))


def test_it_registers_without_importing_torch() -> None:
    registered: list[Backend] = []
    plugin.register_backends(registered.append)
    assert [backend.name for backend in registered] == ["transformers"]
    code = (
        "import sys, llm_magic.backends.accelerate.plugin as p; p.register_backends(lambda b: b.accepts);"
        "heavy = {'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
