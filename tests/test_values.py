from __future__ import annotations

import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from llm_magic.result import Generation
from llm_magic.text import values
from llm_magic.text.values import MAX_TEXT, NoTextError, to_text


def half(x: float) -> float:
    """Half of it."""
    return x / 2


def test_strings_are_as_they_are() -> None:
    assert to_text("a\n{b}").text == "a\n{b}"
    assert type(to_text(Generation("hi")).text) is str


def test_a_long_string_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_STRING", 10)
    found = to_text("0123456789abc")
    assert found.text == "0123456789\n… (3 of 13 characters left out)"
    assert found.note == "3 of 13 characters left out"


def test_frame_as_markdown() -> None:
    frame = pd.DataFrame({"city|x": ["Rome\nIT", "a\\b"], "n": [1, 22], "f": [0.1, math.nan]})
    assert to_text(frame).text == (
        "| city\\|x | n | f |\n| --- | --- | --- |\n| Rome<br>IT | 1 | 0.1 |\n| a\\\\b | 22 | nan |"
    )


def test_a_named_index_is_a_column() -> None:
    frame = pd.DataFrame({"n": [1, 2]}, index=pd.Index(["a", "b"], name="key"))
    assert to_text(frame).text == "| key | n |\n| --- | --- |\n| a | 1 |\n| b | 2 |"
    series = pd.Series([1.5, 2.5], index=["u", "v"], name="speed")
    assert to_text(series).text == "|  | speed |\n| --- | --- |\n| u | 1.5 |\n| v | 2.5 |"
    many = pd.DataFrame({("a", "b"): [1]}, index=pd.MultiIndex.from_tuples([(1, "x")], names=["i", "j"]))
    assert to_text(many).text == "| i, j | a, b |\n| --- | --- |\n| 1, x | 1 |"


def test_a_large_frame_is_capped_and_says_so() -> None:
    frame = pd.DataFrame(np.zeros((1040, 24)), columns=[f"c{i}" for i in range(24)])
    found = to_text(frame)
    lines = found.text.splitlines()
    assert lines[0].count("|") == 21
    assert len(lines) == 2 + 50 + 2
    assert lines[-1] == "(… 990 more rows and 4 more columns; 1,040 rows × 24 columns in all)"
    assert found.note == "990 more rows and 4 more columns; 1,040 rows × 24 columns in all"


def test_an_empty_frame() -> None:
    assert to_text(pd.DataFrame({"a": []})).text == "| a |\n| --- |"


def test_long_cells_are_cut() -> None:
    assert "y" * 200 + "… |" in to_text(pd.DataFrame({"a": ["y" * 300]})).text


def test_polars_frames_by_their_shape() -> None:
    """Not a dependency: a class that says it is polars' and answers like it."""

    class DataFrame:
        __module__ = "polars.dataframe.frame"
        columns = ("a", "b")
        shape = (60, 2)

        def head(self, count: int) -> SimpleNamespace:
            return SimpleNamespace(rows=lambda: [(i, "x") for i in range(count)])

    text = to_text(DataFrame()).text
    assert text.startswith("| a | b |\n| --- | --- |\n| 0 | x |")
    assert text.endswith("(… 10 more rows; 60 rows × 2 columns in all)")


def test_arrays_are_shortened() -> None:
    assert to_text(np.array([[1, 2], [3, 4]])).text == "[[1, 2],\n [3, 4]]"
    found = to_text(np.zeros((100, 100)))
    assert len(found.text) < 1000
    assert found.note == "shortened; an array of float64 with shape (100, 100)"


@pytest.mark.parametrize(
    "value",
    [
        [1, "a", None, [2.5, {"k": (1,)}]],
        {"b": 1, "a": [True]},
        (),
        (1,),
        (1, 2),
        {1},
        set(),
        frozenset({1}),
        OrderedDict(a=1),
        [[], {}],
        None,
        3,
        2.5,
        b"x",
        range(3),
    ],
)
def test_plain_values_read_as_python_writes_them(value: object) -> None:
    assert to_text(value).text == repr(value)


def test_a_long_list_is_cut_without_being_written() -> None:
    found = to_text([list(range(1000))] * 1_000_000)
    assert len(found.text) < MAX_TEXT + 100
    assert found.note == "cut after 100,000 characters; 1,000,000 items in all"


def test_a_list_in_itself() -> None:
    loop: list[object] = [1]
    loop.append(loop)
    assert to_text(loop).text.startswith("[1, [1, [1, ")


def test_functions_and_classes_are_their_source() -> None:
    assert to_text(half).text == 'def half(x: float) -> float:\n    """Half of it."""\n    return x / 2'
    assert to_text(values.ValueText).text.startswith("@dataclass(frozen=True)\nclass ValueText:")


@pytest.mark.parametrize("value", [len, os, dict, "".join])
def test_what_has_no_text(value: object) -> None:
    with pytest.raises(NoTextError):
        to_text(value)


def test_formats_are_those_of_python() -> None:
    assert to_text(3.14159, spec=".2f").text == "3.14"
    assert to_text("é", conversion="a").text == "'\\xe9'"
    assert to_text(None, conversion="r", spec=">6").text == "  None"
    with pytest.raises(ValueError, match="Unknown format code"):
        to_text("x", spec="d")
