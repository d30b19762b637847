from __future__ import annotations

import pytest

from llm_magic.errors import OptionError
from llm_magic.settings import Settings, change_setting, setting_names


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.2", 0.2),
        ("temperature", "none", None),
        ("top_k", "40", 40),
        ("max_new_tokens", "64", 64),
        ("history", "false", False),
        ("system", "You are brief.", "You are brief."),
        ("ctx_size", "4096", 4096),
        ("system", "none", ""),
        ("max_new_tokens", "none", 512),
        ("history", "none", True),
    ],
)
def test_a_value_is_read_as_its_kind(name: str, text: str, value: object) -> None:
    settings = Settings()
    assert change_setting(settings, name, text) == value
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "hot"),
        ("top_p", "1.5"),
        ("max_new_tokens", "0"),
        ("seed", "99999999999999999999"),
        ("top_k", "99999999999999999999"),
        ("ctx_size", "2"),
        ("history", "maybe"),
    ],
)
def test_a_value_out_of_range_changes_nothing(name: str, text: str) -> None:
    settings = Settings()
    before = getattr(settings, name)
    with pytest.raises(OptionError, match=name):
        change_setting(settings, name, text)
    assert getattr(settings, name) == before


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("temperature", "temperature is a number from 0 to 10."),
        ("ctx_size", "ctx_size is a whole number of at least 16."),
        ("history", "history is true or false."),
    ],
)
def test_an_error_says_what_a_setting_takes(name: str, takes: str) -> None:
    with pytest.raises(OptionError) as caught:
        change_setting(Settings(), name, "maybe")
    assert caught.value.next_step == takes


def test_an_unknown_setting_gets_its_closest_name() -> None:
    with pytest.raises(OptionError) as caught:
        change_setting(Settings(), "temprature", "1")
    assert caught.value.next_step == "Did you mean temperature?"


def test_every_setting_has_help() -> None:
    assert all(Settings.class_traits()[name].help for name in setting_names())
