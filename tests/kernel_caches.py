"""A test may change what is known of the processor: kernels are looked for anew then."""

from __future__ import annotations

from functools import cache

import pytest

from llm_magic.backends.accelerate.kernels import cpu_products


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been compiled yet, as long as the test runs."""
    names = (
        "_prepared",
        "_kernel",
        "_compiled",
        "_reader",
        "_dot_reader",
        "_quick_dtype",
        "few_plain_tokens",
        "few_routed_tokens",
    )
    for name in names:
        monkeypatch.setattr(cpu_products, name, cache(getattr(cpu_products, name).__wrapped__))
