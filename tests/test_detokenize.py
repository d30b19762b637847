"""Pieces of text as they come: never half a character, together the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.backends.accelerate.decoding.detokenize import Detokenizer
from tests import tiny

BAD = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "The capital of France is Paris.",
    "naïve façade, 東京タワー, Ελλάδα",
    "🙂🚀 👩‍👩‍👧‍👦 🇫🇷 e\u0301",
    "  two  spaces   and\n\n\tlines  ",
    "def f(x):\n    return {x: 'y'} # !? .",
    "don ' t , we 're . n't",
]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    return tiny.save_tokenizer(folder, byte_level=request.param == "byte-level")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("bytes"))


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(BAD in part for part in parts)


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_between_are_left_out(tokenizer: Any, text: str) -> None:
    ids = [0, *(i for token in tokenizer(text).input_ids for i in (token, 1)), 1, 1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, tiny.VOCABULARY - 1), max_size=40))
def test_any_ids_of_a_byte_level_tokenizer(byte_level: Any, ids: list[int]) -> None:
    """Random models sample bytes that are no UTF-8; the pieces are still what decode makes of all."""
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids, skip_special_tokens=True)


def test_a_character_comes_with_its_last_byte(byte_level: Any) -> None:
    ids = byte_level("東", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert pieces(byte_level, ids) == [""] * (len(ids) - 1) + ["東", ""]


def test_an_incomplete_character_shows_at_the_end(byte_level: Any) -> None:
    ids = byte_level("é東", add_special_tokens=False).input_ids[:-1]
    assert "".join(pieces(byte_level, ids)) == f"é{BAD}"


def test_text_after_a_bad_byte_is_not_held_back(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path, byte_level=False)
    byte = tokenizer.convert_tokens_to_ids("<0xE4>")
    good = tokenizer("ab ab", add_special_tokens=False).input_ids
    parts = pieces(tokenizer, [*tokenizer("東", add_special_tokens=False).input_ids, byte, *good])
    assert "".join(parts).startswith("東")
    assert parts[-1] == ""
    assert BAD in "".join(parts)
