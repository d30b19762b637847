"""Token ids, one at a time, to text that is final: never half a character."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns ids into text as they come.

    The pieces that ``feed`` and ``flush`` return are together what ``tokenizer.decode`` makes of
    all ids. Text is decoded with the piece before it in view, because sentencepiece tokenizers drop
    the space at the beginning of what they decode.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # a piece that was returned, then what was not
        self._returned = 0

    def feed(self, token: int) -> str:
        """Text that became final with ``token``; empty in the middle of a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        piece = self._after_context(text)
        if piece:
            self._ids = self._ids[self._returned :]
            self._returned = len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end, with a replacement character for bytes that stayed incomplete."""
        piece = self._after_context(self._decode(self._ids))
        self._ids, self._returned = [], 0
        return piece

    def _after_context(self, text: str) -> str:
        context = self._decode(self._ids[: self._returned])
        if text.startswith(context):
            return text[len(context) :]
        # Byte fallback turns a whole run of bytes into replacement characters when one is bad.
        return self._decode(self._ids[self._returned :])

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
