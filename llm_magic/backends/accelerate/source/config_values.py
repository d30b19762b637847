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


def whole_number(config: Any, *names: str) -> int:
    """The first of these settings that is a whole number, the largest where layers differ; 0 when none is."""
    for part in (config.get_text_config(decoder=True), config):
        for name in names:
            found = [each for value in values(part, name) for each in _items(value) if type(each) is int]
            if found and max(found) > 0:
                return max(found)
    return 0


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
