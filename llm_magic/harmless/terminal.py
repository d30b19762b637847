"""Model text for terminals: nothing that moves a cursor, sets a title or turns text around gets through.

The filter looks at one character at a time and keeps no state. Without its introducer an escape
sequence is a few visible letters, so ``sanitize(a) + sanitize(b) == sanitize(a + b)``: it can be
used on each piece of a stream, wherever the pieces were cut.
"""

from __future__ import annotations

_KEPT = "\n\t"
_CONTROLS = [*range(0x20), 0x7F, *range(0x80, 0xA0)]  # C0, DEL, C1 (which holds 8-bit CSI and OSC)
_BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # embeddings, overrides, isolates
_ANNOTATIONS = [*range(0xFFF9, 0xFFFC)]
_SURROGATES = range(0xD800, 0xE000)  # half a character: encoding it raises in the middle of a print

_TABLE: dict[int, str | None] = {
    **{code: None for code in (*_CONTROLS, *_BIDI, *_ANNOTATIONS) if chr(code) not in _KEPT},
    **dict.fromkeys(_SURROGATES, "\ufffd"),
}


def sanitize(text: str) -> str:
    """Text that is safe to write to a terminal, and otherwise the same.

    Dropped are C0 controls but newline and tab (so ESC and carriage return too), DEL, C1 controls,
    bidirectional embeddings, overrides and isolates, and interlinear annotation marks; a lone
    surrogate becomes U+FFFD. Joiners and direction marks stay: scripts and emoji need them.
    """
    return text.translate(_TABLE)
