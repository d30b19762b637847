"""Models that cap their attention's scores, as Gemma 2 does, in versions of transformers that forget it.

Up to 5.20 these attend by torch's own kernel unless asked, which caps nothing: other tokens than the model is made for.
Later versions have them attend step by step, with capped scores.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from llm_magic.backends.accelerate.source.config_values import values


def have_scores_capped(config: Any) -> None:
    """Let a model with this configuration attend step by step where its scores would not be capped otherwise."""
    is_open = config._attn_implementation is None
    caps = values(config.get_text_config(decoder=True), "attn_logit_softcapping")
    if is_open and any(caps) and are_caps_forgotten():
        config._attn_implementation = "eager"


@cache
def are_caps_forgotten() -> bool:
    """Whether transformers' usual attention gives the same with capped scores as without; later ones refuse."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    states = (torch.tensor([[[[2.0], [8.0]]]]),) * 3
    layer = SimpleNamespace(is_causal=False)
    try:
        capped = sdpa_attention_forward(layer, *states, None, softcap=1.0)[0]
    except ValueError:
        return False
    return torch.equal(capped, sdpa_attention_forward(layer, *states, None)[0])
