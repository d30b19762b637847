"""The table by which the views' own words for numbers are held against ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_magic import units

TABLE = json.loads((Path(__file__).parents[1] / "labextension" / "tests" / "units.json").read_text())
OURS = {
    "formatBytes": units.format_bytes,
    "formatBandwidth": units.format_bandwidth,
    "formatSeconds": units.format_seconds,
    "formatRate": units.format_rate,
    "formatCount": units.format_count,
    "formatFlops": units.format_flops,
}


@pytest.mark.parametrize(("name", "value", "words"), TABLE)
def test_the_table_says_what_python_writes(name: str, value: float, words: str) -> None:
    assert OURS[name](value) == words
