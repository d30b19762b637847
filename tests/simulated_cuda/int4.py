"""torch's 4-bit kernels for CUDA, as its sources say: half bytes in the order of the tensor cores' lanes.

Written as the kernel is, lane by lane, so that whoever knows another way there can be checked against it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_LANES = 32


def in_lanes(halves: Any) -> Any:
    """``_convert_weight_to_int4pack`` with two inner tiles, of (rows, columns / 2) bytes, the left column high."""
    rows, groups = len(halves), halves.shape[1] // 16
    words = torch.zeros(rows // 8, groups, _LANES, 1, dtype=torch.int64, device=halves.device)
    tiles = halves.view(rows // 8, 8, groups, 16).to(torch.int64)
    for lane in range(_LANES):
        for place in range(4):
            byte = tiles[:, lane // 4, :, lane % 4 + 4 * place]
            words[:, :, lane, 0] |= (byte >> 4) << 4 * place | (byte & 15) << 16 + 4 * place
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


def from_lanes(words: Any) -> Any:
    """The integers that ``in_lanes`` was given, one by one."""
    tiles, groups = words.shape[:2]
    plain = torch.zeros(tiles, 8, groups, 32, dtype=torch.uint8, device=words.device)
    for lane in range(_LANES):
        for place in range(4):
            for right in range(2):
                half = words[:, :, lane, 0] >> 16 * right + 4 * place & 15
                plain[:, lane // 4, :, 2 * (lane % 4 + 4 * place) + right] = half.to(torch.uint8)
    return plain.view(8 * tiles, 32 * groups)


def _product(states: Any, words: Any, group: int, statistics: Any) -> Any:
    scales, zeros = (statistics[..., i].T.repeat_interleave(group, 1) for i in (0, 1))
    weight = (from_lanes(words).to(states.dtype) - 8) * scales + zeros
    return torch.nn.functional.linear(states, weight)


@cache
def install() -> Any:
    """Let torch find them."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", lambda halves, _tiles: in_lanes(halves), "CUDA")
    library.impl("_weight_int4pack_mm", _product, "CUDA")
    return library
