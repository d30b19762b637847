"""How many threads torch computes with in sweeps of few tokens, and that others keep theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.backends.accelerate.kernels import shares, team, torch_threads  # noqa: E402
from llm_magic.backends.accelerate.kernels.torch_threads import held_to_one, threads_of_torch, with_all  # noqa: E402
from llm_magic.backends.accelerate.placement.cpu_linear import serve_linear  # noqa: E402
from tests.engines import ask, load, request  # noqa: E402

TinyModel = Callable[[str], Path]
THREADS = 3

serves = pytest.mark.skipif(shares.serving() is None, reason="OpenMP's threads take the shares here")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@serves
def test_one_and_all_in_turn() -> None:
    with held_to_one():
        assert torch.get_num_threads() == 1
        with held_to_one():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        with with_all():
            assert torch.get_num_threads() == THREADS
            with with_all():
                assert torch.get_num_threads() == THREADS
        assert torch.get_num_threads() == 1
        assert threads_of_torch() == THREADS
    assert torch.get_num_threads() == threads_of_torch() == THREADS
    with with_all():
        assert torch.get_num_threads() == THREADS


@serves
def test_what_is_small_stays_with_one() -> None:
    with held_to_one():
        with with_all(1000):
            assert torch.get_num_threads() == 1
        with with_all(1 << 20):
            assert torch.get_num_threads() == THREADS


@serves
def test_an_error_gives_them_back() -> None:
    def fail(context: Any) -> None:
        with context:
            raise KeyError

    with held_to_one():
        with pytest.raises(KeyError):
            fail(with_all())
        assert torch.get_num_threads() == 1
    with pytest.raises(KeyError):
        fail(held_to_one())
    assert torch.get_num_threads() == THREADS


@serves
def test_other_threads_keep_theirs() -> None:
    found: list[int] = []
    with held_to_one():
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [THREADS]


def test_kernels_of_ours_have_as_many_as_before() -> None:
    expected = team.team()
    with held_to_one():
        assert team.team() == expected


def test_where_openmp_takes_the_shares_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_threads, "_teller", lambda: None)
    with held_to_one():
        assert torch.get_num_threads() == THREADS
        with with_all():
            assert torch.get_num_threads() == THREADS


@serves
@pytest.mark.parametrize(("width", "threads"), [(32, 1), (512, THREADS)])
def test_a_large_layer_without_a_kernel_has_all(
    width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(width, width).eval()
    serve_linear(layer)
    usual, found = torch.nn.functional.linear, list[int]()

    def linear(*args: Any) -> Any:
        found.append(torch.get_num_threads())
        return usual(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.no_grad(), held_to_one():
        layer(torch.randn(1, width))
    assert found == [threads]


@serves
@pytest.mark.parametrize("placement", ["ram", "half"])
def test_sweeps_of_recorded_layers_are_held_to_one(placement: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), placement)
    found: list[tuple[int, int]] = []
    engine.model.model.norm.register_forward_hook(
        lambda _module, inputs, _outputs: found.append((inputs[0].shape[1], torch.get_num_threads()))
    )
    try:
        ask(engine, request("The capital of France", max_new_tokens=6, extra={"prompt_lookup_num_tokens": 0}))
        assert found[0][0] > 1
        assert [threads for _, threads in found[:2]] == [THREADS, THREADS]  # the prompt, and what is recorded
        assert found[2:]
        assert set(found[2:]) == {(1, 1)}
        assert torch.get_num_threads() == THREADS
    finally:
        engine.close()
