"""Attention in parts on a GPU: what one pass over all of the cache gives."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.attention import HIDDEN, few_tokens, parts_of  # noqa: E402

DEVICE = "cuda:0"


def tensors(dtype: Any, batch: int, tokens: int, places: int, shared: int, widths: tuple[int, int]) -> Any:
    torch.manual_seed(3)
    query = torch.randn(batch, 2 * shared, tokens, widths[0]).to(DEVICE, dtype)
    rooms = [torch.randn(batch + 1, 2, places + 256, width).to(DEVICE, dtype) for width in widths]
    key, value = (room[:batch, :, :places] for room in rooms)
    return query, key, value


def causal(batch: int, tokens: int, places: int, last: int) -> Any:
    slots = torch.arange(tokens, device=DEVICE) + last + 1 - tokens
    mask = torch.arange(places, device=DEVICE)[None] <= slots[:, None]
    return mask[None, None].repeat(batch, 1, 1, 1)


def ring(batch: int, tokens: int, places: int) -> Any:
    """Of a window that begins in one part, goes around, and leaves parts out."""
    mask = torch.zeros(batch, 1, tokens, places, dtype=torch.bool, device=DEVICE)
    mask[..., -40:] = mask[..., :700] = True
    mask[:, :, 0, 699:700] = False
    return mask


def bias(mask: Any, like: Any) -> Any:
    return torch.where(mask, 0.0, HIDDEN).to(like.dtype)


def expected(query: Any, key: Any, value: Any, mask: Any, scale: float | None) -> Any:
    """In float64 and one pass."""
    shared = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(shared, 1) for states in (key, value))
    scores = query.double() @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(
    ("batch", "shared", "places", "widths", "scale"),
    [
        (1, 4, 2048, (64, 64), None),
        (3, 4, 2304, (64, 64), 0.2),
        (2, 1, 4352, (128, 128), None),
        (1, 8, 8192, (192, 128), None),
        (2, 7, 2048, (256, 256), None),
        (1, 2, 2048, (100, 100), None),  # rows that the kernel does not take
    ],
)
def test_parts_give_what_one_pass_does(
    dtype: str,
    tokens: int,
    batch: int,
    shared: int,
    places: int,
    widths: tuple[int, int],
    scale: float | None,
) -> None:
    assert parts_of(places) > 1
    states = tensors(getattr(torch, dtype), batch, tokens, places, shared, widths)
    masks = [causal(batch, tokens, places, last) for last in (places - 1, places // 2 + 3, tokens + 1)]
    padded = causal(batch, tokens, places, places - 9)
    padded[-1, :, :, :600] = False
    tolerance = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    for mask in (*masks, padded, ring(batch, tokens, places)):
        out = few_tokens(*states, bias(mask, states[0]), scale)
        assert out.dtype == states[0].dtype
        torch.testing.assert_close(
            out.double(), expected(*states, mask, scale), atol=tolerance, rtol=tolerance
        )


def test_masks_of_a_model_itself() -> None:
    query, key, value = tensors(torch.bfloat16, 1, 2, 2048, 4, (64, 64))
    mask = causal(1, 2, 2048, 30)
    for hidden in (torch.finfo(torch.bfloat16).min, float("-inf")):
        out = few_tokens(query, key, value, torch.where(mask, 0.0, hidden).to(query.dtype))
        torch.testing.assert_close(
            out.double(), expected(query, key, value, mask, None), atol=2e-2, rtol=2e-2
        )


def test_large_scores_do_not_reach_what_is_hidden() -> None:
    query, key, value = tensors(torch.float16, 1, 1, 2048, 4, (64, 64))
    mask = causal(1, 1, 2048, 3)
    key[:, :, :4] *= -30  # scores far below those of what is hidden
    out = few_tokens(query * 10, key, value, bias(mask, query))
    torch.testing.assert_close(
        out.double(), expected(query * 10, key, value, mask, None), atol=4e-3, rtol=4e-3
    )
