"""Parameters that a configuration says are one, and files that have different values for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.errors import SourceError

_ROWS = 64


def not_shared(name: str, parameter: str) -> SourceError:
    """The error for a parameter of a model of this name."""
    return SourceError(
        f"{name} has values of its own for {parameter}, which its config.json says are shared.",
        'Write "tie_word_embeddings": false in its config.json, if the files are right.',
    )


def refuse_untied(name: str, ties: Mapping[str, str], index: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse files in which one parameter of a tie has other values than the other one.

    Files often have a matrix twice. Its first and its last rows are compared: who trains a head changes all of them.

    Parameters
    ----------
    ties
        Parameter to the one whose values it has.
    index
        Where each parameter is in a file, as Accelerate has it.

    Raises
    ------
    SourceError
        With the parameter's name.
    """
    import torch

    for parameter, other in ties.items():
        places = index.get(parameter, {}), index.get(other, {})
        if not all("weight_name" in place for place in places) or places[0] == places[1]:
            continue
        if not all(map(torch.equal, *map(_some_rows, places))):
            raise not_shared(name, parameter)


def _some_rows(place: Mapping[str, Any]) -> list[Any]:
    from safetensors import safe_open

    with safe_open(place["safetensors_file"], framework="pt") as file:
        rows = file.get_slice(place["weight_name"])
        return [rows[:_ROWS], rows[-_ROWS:]]
