"""A packed head on a GPU: some rows at a time where its library would unpack all, and in captured steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.quantizing import packed_head  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, request  # noqa: E402
from tests.gpu.test_placed import DEVICE, RESIDENT, STREAMED, layers, looked_up  # noqa: E402
from tests.gpu.test_split import plan  # noqa: E402
from tests.test_packed_head import numbers_of  # noqa: E402

METHODS = ("nf4", "fp4", "int8", "float8", "quanto-int8")
PROMPT = "The capital of France is"
ALL_RESIDENT = layers(RESIDENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed-head") / "model"
    return tiny.save_llama(path, tied=True, hidden_size=128, intermediate_size=256)


@pytest.fixture
def engine_of(folder: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def load(head: str, way: Any = ALL_RESIDENT, dtype: str = "bfloat16") -> Any:
        spec = ModelSpec(str(folder), quantize="nf4", quantize_head=head, dtype=dtype)
        made.append(BACKEND.load(spec, plan(folder, way, spec), lambda _event: None))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_packed_matrix(
    method: str, tokens: int, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in ("float8", "quanto-int8"):
        pytest.importorskip("optimum.quanto")
    monkeypatch.setattr(packed_head, "UNPACKED_HEAD_BYTES", 50 * 128 * 2)  # rows that are no multiple of it
    head = engine_of(method).model.lm_head
    states = torch.randn(1, tokens, 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = head(states).float()
    expected = states.float() @ numbers_of(head).to(DEVICE).T
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_part_of_it_is_unpacked_at_a_time(
    method: str, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_head, "UNPACKED_HEAD_BYTES", 16 * 128 * 2)
    head, largest = engine_of(method).model.lm_head, 0
    usual = packed_head._numbers

    def numbers(*args: Any) -> Any:
        nonlocal largest
        made = usual(*args)
        largest = max(largest, len(made))
        return made

    monkeypatch.setattr(packed_head, "_numbers", numbers)
    with torch.no_grad():
        head(torch.randn(1, 3, 128, device=DEVICE, dtype=torch.bfloat16))
    assert largest == 16


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_same_tokens_wherever_it_and_the_embeddings_are(
    method: str, engine_of: Callable[..., Any]
) -> None:
    texts = set()
    for way in (ALL_RESIDENT, layers(STREAMED), looked_up(STREAMED, RESIDENT), streamed_head):
        engine = engine_of(method, way, "float32")
        texts |= {ask(engine, request(PROMPT, max_new_tokens=12)).text for _ in range(2)}
        assert engine.status()[0] == "captured decode"
    assert len(texts) == 1


def streamed_head(number: int, label: str) -> Any:
    return STREAMED if label == "head" else RESIDENT
