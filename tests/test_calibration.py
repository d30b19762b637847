"""What was learned of one model serves those like it, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.calibration import keep_constants, kept_constants
from llm_magic.planning.constants import Constants
from tests.layouts import llama8b, packed, qwen32b, starter

LEARNED = Constants(cpu_layer_s=0.7e-3)


@pytest.mark.usefixtures("cache_folder")
def test_a_fit_serves_models_of_the_same_kernels_and_about_the_same_width() -> None:
    keep_constants(llama8b(), LEARNED)
    assert kept_constants(llama8b()) == LEARNED
    assert kept_constants(qwen32b()) == LEARNED  # 5,120 wide, not 4,096
    for other in (starter(), packed(llama8b()), replace(llama8b(), dtype="float32")):
        assert kept_constants(other) == Constants()


def test_a_fit_of_long_ago_that_cannot_be_read_is_none(cache_folder: Path) -> None:
    keep_constants(llama8b(), LEARNED)
    for file in cache_folder.rglob("*.json"):
        file.write_text("{")
    assert kept_constants(llama8b()) == Constants()
