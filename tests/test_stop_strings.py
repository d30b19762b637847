from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_magic.stop_strings import StopStrings


def _cut(text: str, stops: tuple[str, ...]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


@given(
    st.lists(st.text("abX\n", max_size=4), max_size=12),
    st.lists(st.text("abX\n", min_size=1, max_size=3), max_size=3).map(tuple),
)
def test_however_the_text_is_cut_into_pieces_it_ends_at_the_first_stop_string(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    stream = StopStrings(stops)
    shown = "".join(stream.feed(piece) for piece in pieces) + stream.flush()
    text = "".join(pieces)
    # A stream cannot see a stop string that begins earlier but ends in a later piece.
    expected = min(
        (
            _cut("".join(pieces[: n + 1]), stops)
            for n in range(len(pieces))
            if any(s in "".join(pieces[: n + 1]) for s in stops)
        ),
        key=lambda cut: 0,
        default=text,
    )
    assert shown == expected
    assert stream.found == any(stop in text for stop in stops)


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = StopStrings(("</end>",))
    assert stream.feed("yes </") == "yes "
    assert stream.feed("en") == ""
    assert stream.feed("d of it") == "</end of it"
    assert not stream.found


def test_empty_stop_strings_are_ignored() -> None:
    stream = StopStrings(("",))
    assert stream.feed("all of it") == "all of it"
    assert not stream.found
