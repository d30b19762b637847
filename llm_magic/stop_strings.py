"""Ends an answer at a stop string, for every backend alike, and never shows a part of one."""

from __future__ import annotations


class StopStrings:
    """Filters a stream of text pieces.

    Text that might be the beginning of a stop string is held back until it is clear that it is not.

    Parameters
    ----------
    stops
        Strings that end the answer; empty ones are ignored.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The part of the text so far that may be shown now."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
