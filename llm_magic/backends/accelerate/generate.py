"""One answer: transformers' ``generate`` with eyes on every token and every block."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name_of_generate
from llm_magic.backends.accelerate.decoding.decode import REPEATS, Decoding, emptied
from llm_magic.backends.accelerate.decoding.detokenize import Detokenizer
from llm_magic.backends.accelerate.looked_at import ONLY_LOOKS
from llm_magic.backends.accelerate.prompt.prompts import TokenizedPrompt
from llm_magic.events import Emit, PhaseEvent, StopFlag, TokenEvent


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside a forward pass, or between two, when the stop flag is set."""


@dataclass
class Steps:
    """The answer so far: the streamer that ``generate`` hands every sampled token to.

    ``device`` is where the prompt goes, ``block`` the name of the block that began last. Times are ``time.perf_counter()`` values; 0 until there is
    a token.
    """

    detokenizer: Detokenizer
    emit: Emit
    stop: StopFlag
    device: Any
    started: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    first_token: float = 0.0
    last_token: float = 0.0
    block: str = ""
    _prompt_seen: bool = False

    def put(self, tokens: Any) -> None:
        """Take what ``generate`` has sampled; its first call brings the prompt back."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in tokens.flatten().tolist():
            self._add(token)
        if self.stop.is_set():
            raise Stopped

    def end(self) -> None:
        """Part of the streamer's protocol; ``flush`` does the work, however the answer ends."""

    def flush(self) -> None:
        """Hand out the text that waited for the rest of a character."""
        text = self.detokenizer.flush()
        if text:
            self.emit(TokenEvent(text, 0))

    def _add(self, token: int) -> None:
        self.ids.append(token)
        self.last_token = time.perf_counter()
        if not self.first_token:
            self.first_token = self.last_token
            self.emit(PhaseEvent("generating"))
        self.emit(TokenEvent(self.detokenizer.feed(token)))


@contextmanager
def watched_blocks(
    model: Any, blocks: Sequence[str], layers: Sequence[str], steps: Steps, passes: int = 1
) -> Iterator[None]:
    """Look at the stop flag before every block, and report the layers of the prefill's ``passes``.

    ``layers`` are those of ``blocks`` that count as progress.
    """
    counted = frozenset(layers)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            _watch(steps, name, passes * len(layers) if name in counted else 0, shared)
        )
        for shared in [[0]]
        for name in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(steps: Steps, block: str, total: int, done: list[int]) -> Any:
    """A pre-hook; ``total`` layers are reported, 0 for a block that does not count."""

    def before_block(_module: Any, _inputs: Any) -> None:
        steps.block = block
        if steps.stop.is_set():
            raise Stopped
        if total and not steps.first_token:
            steps.emit(PhaseEvent("prefill", min(done[0], total), total, "layers"))
            done[0] += 1

    setattr(before_block, ONLY_LOOKS, True)
    return before_block


def run_generate(model: Any, config: Any, prompt: TokenizedPrompt, cache: Any, decoding: Decoding) -> None:
    """Call ``model.generate`` with a loop of our own; ``Stopped`` ends it quietly.

    What fails before the loop is reached is repeated, too, where ``decoding`` recovers from it.

    Parameters
    ----------
    cache
        Holds a prefix of the prompt, or nothing yet; ``None`` lets transformers make its own.
    decoding
        The loop; its streamer is a `Steps`, which sees every token.
    """
    shown = _ShownOnce(decoding.streamer)

    def generate() -> None:
        _forget_images(model)
        model.generate(
            **_inputs(config, prompt, decoding.streamer.device, cache),
            generation_config=config,
            streamer=shown,
            custom_generate=decoding,
        )

    with suppress(Stopped):
        for _ in range(REPEATS):
            try:
                generate()
                return
            except Exception as error:
                if decoding.has_begun or not decoding.recover(emptied(error)):
                    raise
        generate()


def _forget_images(model: Any) -> None:
    """Take out what the images of an earlier prompt did to the positions of the tokens behind them.

    A model with positions in three dimensions keeps that for the passes over one KV cache, on the device
    of that time. Text has none, whoever called the model before, and wherever its blocks were.
    """
    for module in model.modules():
        if vars(module).get("rope_deltas") is not None:
            module.rope_deltas = None


@dataclass
class _ShownOnce:
    """Shows a streamer the prompt, however often ``generate`` is called for it."""

    streamer: Any
    has_shown: bool = False

    def put(self, prompt: Any) -> None:
        if not self.has_shown:
            self.has_shown = True
            self.streamer.put(prompt)


def _inputs(config: Any, prompt: TokenizedPrompt, device: Any, cache: Any) -> dict[str, Any]:
    """What ``generate`` takes of a prompt."""
    import torch

    input_ids = torch.tensor([prompt.ids], device=device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if cache is not None:
        inputs[cache_name_of_generate()] = cache
    if prompt.beginning:
        start = config.decoder_start_token_id
        first = start if start is not None else config.bos_token_id
        inputs["decoder_input_ids"] = torch.tensor([[first, *prompt.beginning]], device=device)
    return inputs
