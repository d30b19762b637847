"""What a decoder layer takes beyond the read of its weights, and in a prompt beyond its products: Python, launches, norms.

It is measured with layers of transformers, on the device: narrow ones, in which that is most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_magic.backends.accelerate.decoding.attention import use_on_cpu, without_plans
from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.served_model import serve_plain_modules
from llm_magic.host.speed import best_of, median_of

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.recorded.layers import RecordedLayers

LAYERS = 20
WIDTH = 576  # 7 MB a layer in bf16, 142 MB together: more than a core's own caches hold
_INNER = WIDTH * 8 // 3
_KV_WIDTH = WIDTH // 3
_FIRST, _CONTEXT = 32, 1024  # tokens
_PROMPT = 509  # tokens: for about so many products are as quick as for more, but for no round number, which prompts have seldom
_PROMPT_LAYERS = 5  # that read them
_UNLIKE_THE_REST = 3  # sweeps: they compile kernels, and find out which layers follow which
_TOO_LONG = 8  # times the budget, for a first sweep: the device is busy with something else
_BUSY_S = 10e-3  # so is one that takes longer for a layer
_OWN_SHARE = 0.9  # of a second that one thread works: less, and others have the processor
_PROMPTS, _PROMPTS_S = 3, 4.0  # that are timed at the least, and seconds for all of them at most
_ALL_THREADS = 0.6  # of a second of all threads, in prompts, which keep them at work
_LEAST_STATE_S = 1e-12  # where products were slower a moment before than they are in the prompt: next to nothing, but known


class LayerTimes(NamedTuple):
    """What was measured; 0 where it cannot be now.

    Attributes
    ----------
    layer_s
        Seconds of a layer for one token, less those of reading it.
    ahead_s
        The same where layers of the CPU are computed before they are called.
    state_s
        Seconds of a layer of the CPU for each number of a token's state in a prompt, less those of matrix products.
    """

    layer_s: float = 0.0
    ahead_s: float = 0.0
    state_s: float = 0.0


def layer_times(
    device_id: str,
    reads: Callable[[int], float],
    flops: float,
    finish: Callable[[], object],
    budget_s: float,
    *,
    are_ahead: bool = False,
) -> LayerTimes:
    """Measure layers. Whatever is not there, forecasts can do without.

    Parameters
    ----------
    reads
        How fast the device reads that many bytes of weights over and over, in bytes per second: a part of what the
        layers have may lie in a cache. 0: nobody knows.
    flops
        Operations per second of matrix products, as in a prompt.
    finish
        Returns when the device has done what it was given.
    budget_s
        How long to repeat it.
    are_ahead
        Whether layers of the CPU may be that.
    """
    try:
        layers = _Layers(device_id, finish)
        if layers.short_prompt_s() > _TOO_LONG * budget_s:
            return LayerTimes()
        state_s = layers.state_s(flops, budget_s) if device_id == "cpu" and flops else 0.0
        are_ahead = are_ahead and cpu_products.is_there()
        speed = reads(layers.bytes)
        layer_s = layers.layer_s(speed, budget_s, are_ahead=False)
        ahead_s = layers.layer_s(speed, budget_s, are_ahead=True) if are_ahead and layer_s else 0.0
        return LayerTimes(layer_s, ahead_s, state_s)
    except Exception:
        return LayerTimes()


class _Layers:
    """A model of narrow layers, and a text for it."""

    def __init__(self, device_id: str, finish: Callable[[], object]) -> None:
        self._model = _narrow_model(device_id)
        self._cache_name = cache_name(self._model)
        self._device_id, self._finish = device_id, finish
        self._cache = self._new_cache()

    def short_prompt_s(self) -> float:
        """Seconds of some tokens."""
        began = time.perf_counter()
        self._sweep(_FIRST)
        return time.perf_counter() - began

    def state_s(self, flops: float, budget_s: float) -> float:
        """See `LayerTimes`; 0 also where prompts take long, or other programs have a part of the processor."""
        layer_s = self.short_prompt_s() / (
            _FIRST * LAYERS
        )  # not of the first one, for which all is made ready
        if layer_s * _PROMPT * _PROMPT_LAYERS * _PROMPTS > _PROMPTS_S:
            return 0.0

        def prompt() -> None:
            self._cache = self._new_cache()
            self._sweep(_PROMPT)

        config, text = self._model.config, self._cache
        config.num_hidden_layers = _PROMPT_LAYERS
        with _Worked() as worked:
            seconds = best_of(prompt, budget_s) / _PROMPT_LAYERS
        config.num_hidden_layers, self._cache = LAYERS, text
        if worked.threads < _ALL_THREADS * _threads():
            return 0.0
        weights = WIDTH * (2 * (WIDTH + _KV_WIDTH) + 3 * _INNER)
        return max(_LEAST_STATE_S, (seconds - 2 * weights * _PROMPT / flops) / (_PROMPT * WIDTH))

    @property
    def bytes(self) -> int:
        """Of the weights of all layers."""
        return sum(parameter.nbytes for parameter in self._model.model.layers.parameters())

    def layer_s(self, speed: float, budget_s: float, *, are_ahead: bool) -> float:
        """See `LayerTimes`; ``speed`` is that of reading, and 0 where nobody knows it."""
        is_cpu = self._device_id == "cpu"
        recorded = _recorded(self._model, are_ahead=are_ahead) if is_cpu and cpu_products.is_there() else None
        for _ in range(_UNLIKE_THE_REST):
            self._sweep(1)
        with _Worked() as worked:
            seconds = median_of(lambda: self._sweep(1), budget_s / 2) / LAYERS
        if recorded is not None:
            recorded.undo()
        if seconds > _BUSY_S or (is_cpu and worked.threads < _OWN_SHARE):
            return 0.0
        return max(0.0, seconds - self.bytes / LAYERS / speed) if speed else 0.0

    def _sweep(self, tokens: int) -> None:
        import torch

        ids = torch.zeros(1, tokens, dtype=torch.long, device=self._device_id)
        with without_plans():
            self._model(ids, use_cache=True, logits_to_keep=1, **{self._cache_name: self._cache})
        self._finish()

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


class _Worked:
    """How many threads of this process were at work meanwhile, on average."""

    threads = 0.0

    def __enter__(self) -> _Worked:
        self._began, self._before = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self._began
        self.threads = (time.process_time() - self._before) / took if took > 0 else 0.0


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _narrow_model(device_id: str) -> Any:
    """A Llama of `LAYERS` layers and next to no vocabulary, its weights all the same small number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=_INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 192,
        vocab_size=64,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device_id).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    serve_plain_modules(model)
    use_on_cpu(model)
    return model


def _recorded(model: Any, *, are_ahead: bool) -> RecordedLayers:
    from llm_magic.backends.accelerate.recorded.layers import RecordedLayers
    from llm_magic.backends.accelerate.recorded.recordings import Recordings

    layers = {str(number): layer for number, layer in enumerate(model.model.layers)}
    return RecordedLayers(layers, Recordings(), _CONTEXT, are_ahead=are_ahead)
