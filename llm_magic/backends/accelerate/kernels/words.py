"""The 64-bit words that kernels of products are told by: those of the call, then addresses of each part, then their rows."""

from __future__ import annotations

TOKENS, ARRANGED, MATRICES, TEAM, COUNT, COLUMNS, PAIRS, SHARING, BLOCKS, PARTS, SHARES = range(11)
HEAD_WORDS = 11
DATA, SCALES, SHIFTS, RESULTS = range(4)
ADDRESSES = 4
