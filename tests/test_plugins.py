from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_magic.errors import OptionError
from llm_magic.hookspecs import Command, hookimpl
from llm_magic.model import ModelSpec
from llm_magic.plugins import Plugins, pick
from tests.fake_backend import FakeBackend, built_in_points, plugin_points, plugins_with


def _command_plugin(*names: str) -> SimpleNamespace:
    def register_commands(register):
        for name in names:
            register(Command(name, "", lambda session, found: None))

    return SimpleNamespace(register_commands=hookimpl(register_commands))


def test_the_built_ins_enter_by_entry_points() -> None:
    plugins = Plugins()
    assert "transformers" in plugins.backends
    assert {"auto", "balanced", "balanced_low_0", "sequential", "cpu"} <= set(plugins.planners)
    assert {"load", "plan", "map", "ps", "use", "unload", "fix", "help"} <= set(plugins.commands)
    assert set(plugins.formats) >= {"markdown", "text", "code", "json", "html", "math"}
    assert not [status for status in plugins.status if status.error]


def test_a_plugin_that_fails_on_import_is_named_and_breaks_nothing() -> None:
    plugins = Plugins((*plugin_points(ImportError("no module named gone"), _command_plugin("shout")),))
    broken, working = plugins.status
    assert (broken.name, broken.error) == ("plugin0", "ImportError: no module named gone")
    assert working.provides == ("command shout",)


def test_the_error_of_a_plugin_holds_no_place_of_this_computer() -> None:
    (broken,) = Plugins(plugin_points(ImportError(f"no name x in y ({Path.cwd() / 'y.py'})"))).status
    assert broken.error == f"ImportError: no name x in y (.{os.sep}y.py)"


def test_a_plugin_that_takes_a_name_twice_is_left_out_whole() -> None:
    plugins = Plugins(plugin_points(_command_plugin("one"), _command_plugin("two", "one")))
    assert list(plugins.commands) == ["one"]
    assert "'one' is registered already" in plugins.status[1].error


def test_a_third_party_cannot_take_a_built_ins_name() -> None:
    plugins = Plugins((*plugin_points(_command_plugin("load")), *built_in_points()))
    assert plugins.commands["load"].help
    assert [status.name for status in plugins.status if status.error] == ["plugin0"]


def test_a_hook_with_a_wrong_signature_blames_the_plugin() -> None:
    plugin = SimpleNamespace(register_commands=hookimpl(lambda wrong: None))
    (status,) = Plugins(plugin_points(plugin)).status
    assert "register_commands" in status.error or "PluginValidationError" in status.error


def test_an_observer_hears_events_and_one_that_raises_is_dropped() -> None:
    heard = []
    good = SimpleNamespace(session_event=hookimpl(lambda event: heard.extend([event])))
    bad = SimpleNamespace(session_event=hookimpl(lambda session, event: 1 / 0))
    plugins = Plugins(plugin_points(bad, good))
    plugins.notify(None, "first")
    plugins.notify(None, "second")
    assert heard == ["first", "second"]
    assert [status.error for status in plugins.status if status.error] == [
        "ZeroDivisionError: division by zero"
    ]


def test_the_backend_that_accepts_best_is_chosen() -> None:
    plugins = plugins_with(FakeBackend())
    assert plugins.backend_for(ModelSpec("fake:a")).name == "fake"
    with pytest.raises(OptionError, match="No backend can load"):
        plugins.backend_for(ModelSpec("other"))


def test_a_typo_gets_the_closest_name() -> None:
    with pytest.raises(OptionError) as caught:
        pick({"load": Command("load", "", print)}, "laod", "command")
    assert caught.value.next_step == "Did you mean load?"
