from __future__ import annotations

import os
import stat

import pytest

from llm_magic.chat import Chat, Chats, read_chat, save_chat, saved_chats
from llm_magic.errors import SessionError
from llm_magic.events import Message


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
