"""The 64-bit words that kernels are told by: of products those of the call, then addresses of each part, then their rows."""

from __future__ import annotations

from typing import NamedTuple

TOKENS, ARRANGED, MATRICES, TEAM, COUNT, COLUMNS, PAIRS, SHARING, BLOCKS, PARTS, SHARES = range(11)
HEAD_WORDS = 11
DATA, SCALES, SHIFTS, RESULTS = range(4)
ADDRESSES = 4

TARGET, SOURCE, COUNTS, BYTES, TO_TARGET, TO_SOURCE = 0, 1, 2, 5, 6, 9
"""Of a copy of rows; three each of counts and of steps."""


class _Picked(NamedTuple):
    """Of rows whose numbers are told."""

    target: int = 0
    source: int = 1
    numbers: int = 2
    tables: int = 3
    rows: int = 4
    bytes: int = 5
    apart: int = 6


PICKED = _Picked()


class _Largest(NamedTuple):
    """Of the largest of some numbers."""

    source: int = 0
    values: int = 1
    places: int = 2
    rows: int = 3
    columns: int = 4
    most: int = 5
    apart: int = 6


LARGEST = _Largest()
