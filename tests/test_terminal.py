from __future__ import annotations

import os
import random
import sys

import pytest

from llm_magic.harmless.terminal import sanitize
from llm_magic.result import Generation

CORPUS = [
    "\x1b]0;new title\x07",
    "\x1b]52;c;cm0gLXJmIC8=\x1b\\",  # writes the clipboard
    "\x1b]8;;https://evil.test\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",
    "\x1b[31mred\x1b[0m",
    "\x1b[?1049h",
    "\x1b[6n",  # makes the terminal type an answer
    "\x1bP$q\x1b\\",
    "\x1bc",
    "\x9b2J",
    "\x9d0;t\x9c",
    "\x90x\x9c",
    "a\rb",
    "a\x08\x08b",
    "\x07\x00\x0b\x0c\x0e\x0f\x7f\x85\x84",
    "user\u202etxt.exe",
    "\u202a\u202b\u202c\u202d\u2066\u2067\u2068\u2069",
    "\ufff9a\ufffab\ufffb",
    "\ud83d half",
    "".join(map(chr, range(0x100))),
]
FORBIDDEN = {
    chr(c) for c in (*range(0x20), 0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
FORBIDDEN -= {"\n", "\t"}


@pytest.mark.parametrize("text", CORPUS)
def test_no_control_gets_through(text: str) -> None:
    clean = sanitize(text)
    assert not FORBIDDEN & set(clean)
    clean.encode()  # a lone surrogate would raise


@pytest.mark.parametrize(
    "text",
    [
        "plain\n\tindented",
        "naïve café",
        "👩\u200d👩\u200d👧",
        "می\u200cخواهم",
        "שלום\u200f!",
        "日本語",
        "e\u0301",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert sanitize(text) == text


def test_pieces_of_a_stream_are_cut_anywhere() -> None:
    text, draw = "".join(CORPUS), random.Random(3)
    for _ in range(200):
        cuts = sorted(draw.sample(range(len(text)), 5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(map(sanitize, pieces)) == sanitize(text)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_what_a_terminal_receives() -> None:
    """The bytes at the other end of a real pseudo-terminal, as IPython prints an answer."""
    import tty

    from IPython.lib.pretty import pretty

    text = "".join(CORPUS)
    shown = [sanitize(text), pretty(Generation(text)), pretty([Generation(text)]), repr(Generation(text))]
    reading, writing = os.openpty()
    try:
        tty.setraw(writing)  # the line discipline must not add anything of its own
        received = b""
        for line in "\n".join(shown).splitlines(keepends=True):
            os.write(writing, line.encode())
            received += os.read(reading, 65536)
    finally:
        os.close(writing)
        os.close(reading)
    assert received.decode() == "\n".join(shown)
    assert not FORBIDDEN & set(received.decode())
