"""Numbers that go from the host to another device: meta's, which has no copies either, stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_magic.backends.accelerate.decoding.host_numbers import written_by_kernels

META = torch.device("meta")
FAR = torch.empty(2, dtype=torch.float64, device=META)
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "to a device": lambda number: number.to(META),
    "by its name": lambda number: number.to("meta"),
    "in another type": lambda number: number.to(META, torch.float16),
    "by keyword": lambda number: number.to(device="meta", dtype=torch.bfloat16, copy=True),
    "to where another is": lambda number: number.to(FAR),
}


class Operations(TorchDispatchMode):
    """What torch runs, by name, with its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.name(), args[1] if len(args) > 1 else None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [1e-5, 7, True])
@pytest.mark.parametrize("move", MOVES)
def test_a_kernel_writes_a_number(move: str, value: Any) -> None:
    number = torch.tensor(value)
    wanted = MOVES[move](number)
    with Operations() as operations, written_by_kernels():
        moved = MOVES[move](number)
    assert (moved.shape, moved.dtype, moved.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert ("aten::full", number.item()) in operations.seen
    assert "aten::_to_copy" not in {name for name, _ in operations.seen}


def test_all_else_moves_as_ever() -> None:
    number, several = torch.tensor(1.5), torch.tensor([1.5])
    with Operations() as operations, written_by_kernels():
        assert number.to("cpu") is number
        assert number.to(torch.float64).item() == 1.5
        assert number.to("cpu", copy=True) is not number
        assert several.to(META).shape == (1,)
        assert FAR[0].to(META).device == META
    assert "aten::full" not in {name for name, _ in operations.seen}
    with Operations() as operations:
        number.to(META)
    assert operations.seen == [("aten::_to_copy", None)]
