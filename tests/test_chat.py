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


def command(session: Session, action: str, name: str = "") -> str:
    return CHAT.run(session, argparse.Namespace(action=action, name=name)).text


def say(session: Session, *words: str) -> None:
    for word in words:
        session.chats.current.messages += [Message("user", word), Message("assistant", word.upper())]


def saved_words(name: str) -> list[str]:
    return [message.content for message in read_chat(name).messages if message.role == "user"]


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
    shown = command(Session(), "list")
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


# %llm chat save, and back


def test_saving_again_under_the_same_name_writes_the_chat_as_it_is_now() -> None:
    session = Session()
    for word in ("one", "two"):
        say(session, word)
        assert "default is saved as trip" in command(session, "save", "trip")
        assert saved_words("trip")[-1] == word
    again = Session()
    command(again, "use", "trip")
    say(again, "three")
    assert "trip is saved (3 turns)" in command(again, "save")
    assert saved_words("trip") == ["one", "two", "three"]


def test_an_answer_that_was_continued_or_had_controls_is_the_same_chat() -> None:
    session = Session()
    session.chats.current.messages += [Message("user", "\x1b[1mhi"), Message("assistant", "Once")]
    command(session, "save")
    session.chats.current.messages[-1] = Message("assistant", "Once upon")
    command(session, "save")
    assert read_chat("default").messages[-1].content == "Once upon"


def test_a_chat_is_saved_by_its_own_name_whichever_is_current() -> None:
    session = Session()
    session.chats.new("side")
    say(session, "aside")
    session.chats.use("default")
    say(session, "main")
    command(session, "save", "side")
    assert saved_words("side") == ["aside"]


def test_an_empty_chat_hides_no_saved_one() -> None:
    yesterday, today = Session(), Session()
    say(yesterday, "one", "two")
    command(yesterday, "save")
    assert "brings the saved one back" in command(today, "show")
    assert "ONE" in command(today, "show", "default")
    assert ["*", "default", "2", "yes"] in [line.split() for line in command(today, "list").splitlines()]
    assert "(2 turns so far)" in command(today, "use", "default")
    assert today.chats.current.turns == 2


def test_saving_writes_over_no_other_chat() -> None:
    yesterday, today = Session(), Session()
    say(yesterday, "one", "two")
    command(yesterday, "save")
    say(today, "other")
    with pytest.raises(SessionError, match="Another chat is saved as 'default'") as caught:
        command(today, "save")
    assert caught.value.next_step == "%llm chat save chat-1 keeps both."
    assert saved_words("default") == ["one", "two"]
    assert "%llm reset, then %llm chat use default" in command(today, "use", "default")
    command(today, "save", "chat-1")
    assert (saved_words("default"), saved_words("chat-1")) == (["one", "two"], ["other"])


def test_a_chat_that_is_not_the_current_one_is_kept_beside_another_saved_one_too() -> None:
    session = Session()
    save_chat(Chat("my side", messages=[Message("user", "saved elsewhere")]))
    session.chats.keep(Chat("my side", messages=[Message("user", "here")]), make_current=False)
    with pytest.raises(SessionError) as caught:
        command(session, "save", "my side")
    assert caught.value.next_step == "%llm chat use 'my side', then %llm chat save chat-1 keeps both."


def test_a_damaged_file_is_not_written_over(tmp_path) -> None:
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "default.json").write_text("{")
    session = Session()
    say(session, "one")
    with pytest.raises(SessionError, match="Another chat"):
        command(session, "save")


def test_an_empty_chat_is_not_saved() -> None:
    with pytest.raises(SessionError, match="default is empty"):
        command(Session(), "save", "trip")
    assert saved_chats() == []
