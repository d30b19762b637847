"""What the benchmarks hold others against."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from benchmarks.ceilings import GpuCeiling  # noqa: E402

pytestmark = pytest.mark.gpu


class FewProducts:
    """In place of the layers of a large model."""

    def rate(self, seconds: float) -> float:
        return torch.ones(8).sum().item()


def test_copies_reads_and_small_copies_beside_a_large_one() -> None:
    ceiling = GpuCeiling()
    ceiling._cpu = FewProducts()
    found = ceiling.measure()
    kinds = ("pageable", "pageable_beside", "pinned", "pinned_beside")
    rates = ("bus_bytes_per_s", "read_bytes_per_s", *(f"small_{kind}_s" for kind in kinds))
    assert all(found[name] > 0 for name in rates)
