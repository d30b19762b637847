"""Weight files that safetensors cannot map: read all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from llm_magic.backends.accelerate.source.large_files import LargeFile, large_files_opened, open_safetensors
from llm_magic.errors import LLMMagicError
from llm_magic.model import ModelSpec
from tests.engines import ask, load
from tests.packed_checkpoints import save_bitsandbytes

PROMPT = "The capital of France"


class Refused:
    """As ``safe_open`` where a file is larger than RAM and swap."""

    def __init__(self, path: Any, **_options: Any) -> None:
        raise RuntimeError(
            f"unable to mmap 65524335640 bytes from file <{path}>: Cannot allocate memory (12)"
        )


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "safe_open", Refused)


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),  # what follows it is not aligned
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "single": torch.randn(7),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "file")
    with (
        LargeFile(tmp_path / "file") as mine,
        safetensors.safe_open(tmp_path / "file", framework="pt") as usual,
    ):
        assert set(mine.keys()) == set(usual.keys())
        for name, tensor in tensors.items():
            found, part = mine.get_tensor(name), mine.get_slice(name)
            assert torch.equal(found.float(), tensor.float())
            assert found.dtype == tensor.dtype
            assert part.get_shape() == list(tensor.shape)
            assert part.get_dtype() == usual.get_slice(name).get_dtype()
        assert torch.equal(mine.get_slice("half")[1:, 2], tensors["half"][1:, 2])
        mine.get_tensor("single").fill_(1)  # nobody's file


@pytest.mark.parametrize("placement", ["ram", "half", "disk", "mapped"])
@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_models_load(
    quantize: str,
    placement: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama = tiny_model("llama")
    spec = ModelSpec(str(llama), quantize=quantize)
    texts = []
    for is_large in (False, True):
        if is_large:
            monkeypatch.setattr(safetensors, "safe_open", Refused)
        engine = load(llama, placement, spec=spec)
        texts.append(ask(engine, PROMPT).text)
        engine.close()
    assert texts[0] == texts[1]


def test_packed_checkpoints_load(tmp_path: Path, refused: None) -> None:
    engine = load(save_bitsandbytes(tmp_path / "model", "nf4", is_double=True), "half")
    assert ask(engine, PROMPT).text
    engine.close()


def test_what_is_no_such_file_is_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no weights at all")
    with pytest.raises(safetensors.SafetensorError):
        open_safetensors(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        open_safetensors(tmp_path / "nothing")
    with pytest.raises(LLMMagicError):
        LargeFile(tmp_path / "file")


def test_the_libraries_are_left_as_they_were() -> None:
    from accelerate.utils import offload
    from transformers import modeling_utils

    before = offload.safe_open, modeling_utils.safe_open
    with large_files_opened():
        assert offload.safe_open is modeling_utils.safe_open is open_safetensors
    assert (offload.safe_open, modeling_utils.safe_open) == before
