"""Defaults of prompts and loads: what ``%llm set`` and ``%config LLMMagic`` change."""

from __future__ import annotations

import difflib
import math
from typing import Any

from traitlets import Bool, Float, Int, TraitError, Unicode, validate
from traitlets.config import Configurable

from llm_magic.errors import OptionError
from llm_magic.events import SAMPLING_LIMITS


def _range(name: str) -> dict[str, Any]:
    limits = SAMPLING_LIMITS[name]
    return {"min": limits.low, "max": limits.high}


class Settings(Configurable):
    """Defaults that a cell's own options override."""

    temperature = Float(
        None,
        allow_none=True,
        help="Sampling temperature; 0 is greedy, none leaves it to the model.",
        **_range("temperature"),
    ).tag(config=True)
    top_p = Float(
        None,
        allow_none=True,
        help="Nucleus sampling: keep the likeliest tokens up to this probability.",
        **_range("top_p"),
    ).tag(config=True)
    top_k = Int(
        None, allow_none=True, help="Sample among this many likeliest tokens.", **_range("top_k")
    ).tag(config=True)
    min_p = Float(
        None,
        allow_none=True,
        help="Drop tokens below this share of the likeliest one.",
        **_range("min_p"),
    ).tag(config=True)
    seed = Int(
        None,
        allow_none=True,
        help="Seed of the sampling; none draws one for each answer and records it.",
        **_range("seed"),
    ).tag(config=True)
    max_new_tokens = Int(512, help="Longest answer in tokens.", **_range("max_new_tokens")).tag(config=True)
    system = Unicode("", help="System prompt of new chats and single prompts.").tag(config=True)
    format = Unicode("markdown", help="How answers are shown: markdown, text, code, json, html or math.").tag(
        config=True
    )
    ctx_size = Int(
        8192,
        min=16,
        help="Tokens of context to plan for when --ctx-size is not given (at most what the model has).",
    ).tag(config=True)
    history = Bool(True, help="Whether prompt cells continue the current chat.").tag(config=True)

    @validate("temperature", "top_p", "min_p")
    def _not_nan(self, proposal: dict[str, object]) -> object:
        value = proposal["value"]
        if isinstance(value, float) and math.isnan(value):  # NaN passes every range check
            raise TraitError("nan is not a number to sample with")
        return value


_TAKEN = {"ctx_size": "a whole number of at least 16", "history": "true or false"}


def setting_names() -> list[str]:
    """Names that ``%llm set`` takes."""
    return sorted(Settings.class_own_traits(config=True))


def check_name(name: str) -> str:
    """The name of a setting.

    Raises
    ------
    OptionError
        When there is no such setting; it names the closest one.
    """
    if name not in setting_names():
        close = difflib.get_close_matches(name, setting_names(), n=1)
        raise OptionError(
            f"There is no setting {name!r}.",
            f"Did you mean {close[0]}?" if close else f"Known: {', '.join(setting_names())}.",
        )
    return name


def change_setting(settings: Settings, name: str, text: str) -> object:
    """Set one default from what a person typed; ``none`` clears it, or brings its default back. Returns the new value.

    Raises
    ------
    OptionError
        When there is no such setting, or the value is out of its range.
    """
    trait = Settings.class_traits()[check_name(name)]
    try:
        cleared = None if trait.allow_none else trait.default_value
        setattr(settings, name, cleared if text.lower() == "none" else trait.from_string(text))
    except (TraitError, ValueError):
        words = SAMPLING_LIMITS[name].words if name in SAMPLING_LIMITS else _TAKEN.get(name)
        takes = f"{name} is {words}." if words else f"{name}: {trait.help}"
        raise OptionError(f"{text!r} is no value for {name}.", takes) from None
    return getattr(settings, name)
