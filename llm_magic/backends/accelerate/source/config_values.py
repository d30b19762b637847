"""Values of a model's configuration, whose layers may differ from one another.

Gemma 4, for one, has wider heads where it attends to everything. transformers then refuses to name one value for
all of them, and has a configuration for each layer.
"""

from __future__ import annotations

from typing import Any


def of_layer(config: Any, number: int) -> Any:
    """The configuration of one layer."""
    if not getattr(config, "is_heterogeneous", False) or number >= len(config.per_layer_config):
        return config
    return config.per_layer_config[number]


def values(config: Any, name: str) -> list[Any]:
    """The value, or that of every layer where they differ; ``None`` for a name that it does not have."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # layers differ
        return [getattr(layer, name, None) for layer in config.per_layer_config]
