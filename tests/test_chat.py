from __future__ import annotations

import argparse
import json
import os
import stat

import pytest

from llm_magic.chat import Chat, Chats, read_chat, save_chat, saved_chats
from llm_magic.commands.chat import CHAT
from llm_magic.errors import SessionError
from llm_magic.events import Message
from llm_magic.session import Session


@pytest.fixture(autouse=True)
def _data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path))


def test_a_saved_chat_comes_back_whole() -> None:
    chat = Chat("recipes", "Be brief.", [Message("user", "Soup?"), Message("assistant", "Öl & Salz 🍲")])
    save_chat(chat)
    assert read_chat("recipes") == chat
    assert saved_chats() == ["recipes"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_saved_chat_is_readable_by_its_owner_alone(tmp_path) -> None:
    save_chat(Chat("mine"))
    assert stat.S_IMODE((tmp_path / "chats" / "mine.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\\b", "x" * 65, "nul\0"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(SessionError, match="cannot name a chat"):
        save_chat(Chat("c"), name) if name else Chats().keep(read_chat(name))


@pytest.mark.parametrize("text", ["{", "[]", '{"messages": 3}', '{"messages": [{"role": "user"}]}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, text: str) -> None:
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "old.json").write_text(text, encoding="latin-1")
    with pytest.raises(SessionError, match="'old' is damaged"):
        read_chat("old")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_saving_again_closes_an_open_file_and_follows_no_link(tmp_path, monkeypatch) -> None:
    chats, elsewhere = tmp_path / "data" / "chats", tmp_path / "precious.json"
    elsewhere.write_text("years of work")
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path / "data"))
    previous = os.umask(0)
    try:
        save_chat(Chat("mine"))
        (chats / "mine.json").chmod(0o666)
        (chats / "linked.json").symlink_to(elsewhere)
        save_chat(Chat("mine"))
        save_chat(Chat("linked"))
    finally:
        os.umask(previous)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (chats.parent, chats, chats / "mine.json")]
    assert modes == [0o700, 0o700, 0o600]
    assert elsewhere.read_text() == "years of work"
    assert sorted(path.name for path in chats.iterdir()) == ["linked.json", "mine.json"]


def test_files_that_are_no_chats_hide_no_others(tmp_path) -> None:
    (tmp_path / "chats").mkdir()
    for name in ("a;b", "x\x1b[2J"):
        (tmp_path / "chats" / f"{name}.json").write_text("{}")
    (tmp_path / "chats" / "folder.json").mkdir()
    (tmp_path / "chats" / "old.json").write_text("{")
    save_chat(Chat("good"))
    assert saved_chats() == ["good", "old"]
    shown = CHAT.run(Session(), argparse.Namespace(action="list", name="")).text
    assert [line.split() for line in shown.splitlines()[2:4]] == [
        ["good", "0", "yes"],
        ["old", "damaged", "yes"],
    ]


def test_a_saved_chat_brings_no_controls_back(tmp_path) -> None:
    (tmp_path / "chats").mkdir()
    turn = {"role": "assistant", "content": "a\x1b]0;x\x07b\u202ec"}
    (tmp_path / "chats" / "c.json").write_text(json.dumps({"system": "\x9b1m", "messages": [turn]}))
    assert read_chat("c") == Chat("c", "1m", [Message("assistant", "a]0;xbc")])


def test_new_use_and_delete() -> None:
    chats = Chats()
    first = chats.new("one")
    assert chats.current is first
    assert chats.new().name == "chat-1"
    with pytest.raises(SessionError, match="already"):
        chats.new("one")
    assert chats.use("one") is first
    chats.delete("one")
    assert chats.current.name == "default"
    with pytest.raises(SessionError, match="no chat 'one'"):
        chats.use("one")


def test_delete_removes_the_file_too() -> None:
    chats = Chats()
    save_chat(chats.new("old"))
    chats.delete("old")
    assert saved_chats() == []
