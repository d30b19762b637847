from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llm_magic.harmless.paths import hide_folders, without_paths
from llm_magic.text.history import ErrHistory, format_error


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.fixture
def errors(shell: InteractiveShell) -> Iterator[ErrHistory]:
    history = ErrHistory()

    def record(result: object) -> None:
        error = result.error_before_exec or result.error_in_exec  # type: ignore[attr-defined]
        if error is not None:
            history.record(result.execution_count, result.info.raw_cell, error)  # type: ignore[attr-defined]

    shell.reset()
    shell.execution_count = 1
    shell.events.register("post_run_cell", record)
    yield history
    shell.events.unregister("post_run_cell", record)


def run(shell: InteractiveShell, *cells: str) -> None:
    for cell in cells:
        shell.run_cell(cell, store_history=True)


def test_a_traceback_begins_at_the_cell(shell: InteractiveShell, errors: ErrHistory) -> None:
    run(shell, "def f(x):\n    return 1 / x", "y = 0\nf(y)")
    text = errors[2]
    assert text.startswith(
        'Traceback (most recent call last):\n  File "In[2]", line 2, in <module>\n    f(y)'
    )
    assert 'File "In[1]", line 2, in f' in text
    assert text.endswith("ZeroDivisionError: division by zero")
    assert "IPython" not in text
    assert errors.source(2) == "y = 0\nf(y)"


def test_a_cell_that_does_not_parse(shell: InteractiveShell, errors: ErrHistory) -> None:
    run(shell, "x = = 1")
    assert errors[1].startswith('File "In[1]", line 1\n    x = = 1')
    assert errors[1].endswith("SyntaxError: invalid syntax")


def test_causes_are_told(shell: InteractiveShell, errors: ErrHistory) -> None:
    run(shell, "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('bad') from e")
    assert "KeyError: 'k'" in errors[1]
    assert "direct cause" in errors[1]
    assert errors[1].endswith("ValueError: bad")


def test_deep_tracebacks_keep_their_ends(shell: InteractiveShell, errors: ErrHistory) -> None:
    run(
        shell,
        "def f(n):\n    return g(n - 1) if n else 1 / 0",
        "def g(n):\n    return f(n - 1) if n else 1 / 0",
        "f(40)",
    )
    assert errors[3].count("File ") == 10
    assert errors[3].endswith("ZeroDivisionError: division by zero")


def test_no_folder_of_this_machine(shell: InteractiveShell, errors: ErrHistory) -> None:
    run(
        shell,
        "import os, json\nopen(os.path.expanduser('~/a/b.txt'))",
        "json.loads('{')",
        f"open({str(Path.cwd() / 'c.txt')!r})",
    )
    for number in (1, 2, 3):
        assert str(Path.home()) + "/" not in errors[number]
        assert str(Path.cwd()) not in errors[number]
    assert "'~/a/b.txt'" in errors[1] or "~\\" in errors[1]
    assert "json" in errors[2]
    assert "c.txt" in errors[3]


def test_folders_are_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, work = tmp_path / "home" / "alice", tmp_path / "home" / "alice" / "project"
    work.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", classmethod(lambda _cls: home))
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.chdir(work)
    assert hide_folders(
        f"in {work / 'a.py'} and {home / 'b.py'}"
    ) == f"in {Path('./a.py')!s} and ~/b.py".replace("in a.py", "in ./a.py")
    assert hide_folders("/scratch/alice/data") == "/scratch/~/data"
    assert hide_folders("alice/b and malice") == "alice/b and malice"
    assert hide_folders(json.dumps(str(home))) == '"~"'


def test_colours_and_controls_are_gone() -> None:
    assert format_error(ValueError("\x1b[31mred\x1b[0m \x1b]0;t\x07")) == "ValueError: red ]0;t"


def test_a_long_message_is_cut_in_the_middle() -> None:
    text = format_error(ValueError("x" * 100_000 + "end"))
    assert len(text) < 9000
    assert "characters left out" in text
    assert text.endswith("end")


def test_cells_without_an_error() -> None:
    errors = ErrHistory()
    assert errors.latest() is None
    with pytest.raises(KeyError, match="raised no error"):
        errors[3]
    errors.record(7, "a", ValueError("one"))
    errors.record(3, "b", ValueError("two"))
    assert (errors.latest(), errors.cells(), len(errors)) == (3, "In[7], In[3]", 2)
    assert errors[-1] == "ValueError: two"
    assert 7 in errors
    assert 8 not in errors


def test_old_errors_are_forgotten_and_none_holds_the_exception() -> None:
    import gc
    import weakref

    class Loud(Exception):
        pass

    errors = ErrHistory()
    error = Loud("x")
    watcher = weakref.ref(error)
    for number in range(150):
        errors.record(number, "", error)
    del error
    gc.collect()
    assert watcher() is None
    assert len(errors) == 100
    assert 0 not in errors


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("No such file: '/data/alice/my.bin'", "No such file: 'my.bin'"),
        ("(/srv/models/a/config.json:3)", "(config.json:3)"),
        ("C:\\Users\\alice\\w.bin is gone", "w.bin is gone"),
        ("%llm load org/model · ./a/b/c · ~/a/b/c", "%llm load org/model · ./a/b/c · ~/a/b/c"),
        (
            "see https://host/a/b and 48%/52% CPU/GPU, 3 tok/s",
            "see https://host/a/b and 48%/52% CPU/GPU, 3 tok/s",
        ),
    ],
)
def test_other_absolute_paths_are_cut_to_their_last_part(text: str, left: str) -> None:
    assert without_paths(text) == left
