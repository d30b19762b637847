"""Stacks of experts in floats of 4 bits, as gpt-oss comes.

==============  ============================================================================================
``X_blocks``    uint8 ``[experts, out, groups, 16]``: two numbers in a byte, the first in the low half
``X_scales``    uint8 ``[experts, out, groups]``: exponents of 2, more by 127
==============  ============================================================================================

Source: OpenAI's ``gpt_oss/torch/weights.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.files.extents import Extent, StoredTensor
from llm_magic.backends.accelerate.packed.prepacked import Prepacked, damaged

BLOCKS, SCALES = "_blocks", "_scales"
"""What follows the name of a stack."""
MXFP4_GROUP = 32
"""Columns that share an exponent."""


@dataclass(frozen=True)
class PackedStacks(Prepacked):
    """A stack of matrices that the files have as one; each of ``matrices`` is its name.

    Attributes
    ----------
    part
        Gets a part of a tensor, of a name and an index of its first dimension.
    stored
        Tells where a tensor is in the files.
    """

    part: Callable[[str, int], Any]
    stored: Callable[[str], StoredTensor | None]

    def extents(self) -> dict[str, Extent]:
        """Where the bytes of all entries and of all exponents are in the files, by what a packed weight calls them.

        Raises
        ------
        SourceError
            When they are of no shape or dtype that belongs together.
        """
        (name,), count = self.matrices[0], len(self.matrices)
        blocks, scales = self.stored(f"{name}{BLOCKS}"), self.stored(f"{name}{SCALES}")
        if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"uint8"}:
            raise damaged(name)
        if len(scales.shape) != 3 or scales.shape[0] != count or blocks.shape != (*scales.shape, 16):
            raise damaged(name)
        return {"weight": blocks.extent, "scales": scales.extent}

    def shape(self) -> tuple[int, int]:
        """Of a matrix: ``(out, in)``."""
        scales = self.stored(f"{self.matrices[0][0]}{SCALES}")
        return (scales.shape[1], MXFP4_GROUP * scales.shape[2]) if scales else (0, 0)

    def parts(self, index: int, device: Any) -> tuple[Any, Any]:
        """Entries ``[out, in / 2]`` and exponents ``[out, groups]`` on ``device``; pages of the file, where that is the CPU.

        Raises
        ------
        SourceError
            When the parts do not belong together.
        """
        self.extents()  # refuses what is no stack of so many
        (name,) = self.matrices[index]
        blocks, scales = (self.part(f"{name}{end}", index) for end in (BLOCKS, SCALES))
        return blocks.to(device).flatten(1), scales.to(device)

    def numbers(self, device: Any, index: int = 0) -> Any:
        from llm_magic.backends.accelerate.packed.scaled_floats import Form

        data, scales = self.parts(index, device)
        form = Form("mxfp4", len(data), 2 * data.shape[1], MXFP4_GROUP)
        return form.numbers(data, scales, self.dtype)
