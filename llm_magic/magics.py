"""``%llm`` and ``%%llm``: parse, call the session, display."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from IPython.core import magic as ipython_magic
from IPython.core.interactiveshell import InteractiveShell
from traitlets import TraitError, validate

from llm_magic.arguments import HELP_FLAGS, split_words
from llm_magic.cell import CellLine, parse_cell_line
from llm_magic.commands.help import cell_help, command_help, command_parser
from llm_magic.display import UI, NotebookScreen, TextScreen, choose_ui
from llm_magic.errors import OptionError, has_own_words, interrupts_in_a_line
from llm_magic.events import RenderedPrompt
from llm_magic.formats import extract_code
from llm_magic.notebook import Notebook
from llm_magic.plugins import pick
from llm_magic.screen import Screen
from llm_magic.session import LAST, Session
from llm_magic.settings import Settings
from llm_magic.text.prompt import Interpolated, interpolate
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack

_ONE_EXPRESSION = re.compile(r"\{[^{}]*\}")

# IPython types its decorators for plain functions, not for methods.
_magics_class: Any = ipython_magic.magics_class
_line_magic: Any = ipython_magic.line_magic
_cell_magic: Any = ipython_magic.cell_magic
_no_var_expand: Any = ipython_magic.no_var_expand


class IPythonNotebook(Notebook):
    """The notebook of an IPython shell."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell.user_ns)
        self._shell = shell

    def set_next_input(self, code: str) -> bool:
        """Put code into a new cell; the user reads it and runs it, or not."""
        self._shell.set_next_input(code, replace=False)
        return True

    def record_error(self, result: Any) -> None:
        """IPython's ``post_run_cell``: remember what the cell raised."""
        error = result.error_before_exec or result.error_in_exec
        # Ours say what to do already, and are nothing that a model could mend.
        if error is None or has_own_words(error):
            return
        if result.execution_count is not None:
            self.errors.record(result.execution_count, result.info.raw_cell, error)


@_magics_class
class LLMMagic(ipython_magic.Magics, Settings):
    """Run language models over VRAM, RAM and disk. ``%llm help`` lists the commands."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        self.session = session
        super().__init__(shell=shell)
        self.notebook = IPythonNotebook(shell)
        is_notebook = hasattr(shell, "kernel")
        ui = choose_ui(is_notebook)
        session.settings = self
        session.notebook = self.notebook
        session.screen = _screen(ui, session)

    @validate("format")
    def _is_a_format(self, proposal: dict[str, str]) -> str:
        if proposal["value"] not in self.session.plugins.formats:
            raise TraitError(f"format is one of {', '.join(self.session.plugins.formats)}")
        return proposal["value"]

    @_no_var_expand
    @_line_magic("llm")
    def command(self, line: str) -> None:
        """Load, place, watch and unload language models.

        Without a command, ``%llm`` shows a status card.

        Examples::

            %llm load starter
            %llm load Qwen/Qwen3-8B --max-memory 0=6GiB,cpu=24GiB
            %llm plan starter --max-memory cpu=150MiB
            %llm map
            %llm move layers.20-31 cpu
            %llm ps
            %llm unload
            %llm help
        """
        screen = self.session.screen
        screen.begin()
        words = split_words(line)
        command = pick(self.session.plugins.commands, _command_name(words), "command")
        if any(flag in words[1:] for flag in HELP_FLAGS):
            screen.show(command_help(command))
            return
        found = command_parser(command).parse([self._argument(word) for word in words[1:]])
        with interrupts_in_a_line(f"%llm {command.name} was interrupted."), self.session.answers_bound():
            shown = command.run(self.session, found)
        if shown is not None:
            screen.show(shown)

    @_no_var_expand
    @_cell_magic("llm")
    def prompt(self, line: str, cell: str) -> None:
        """Ask a loaded model. The cell is the prompt; ``{expr}`` is replaced by its value.

        The answer streams in, and stays in ``_llm``.

        Examples::

            %%llm
            What is the capital of France?

            %%llm answer << -t 0.2 -n 200
            Summarise this table: {df.head(10)}

            %%llm --system "You answer in JSON." -f json
            Three colours, with their hex codes.

            %%llm --continue
        """
        screen = self.session.screen
        screen.begin()
        parsed = parse_cell_line(line, self._expand)
        if parsed.help:
            screen.show(cell_help())
            return
        text = (cell if parsed.raw else self._expand(cell)).strip("\n")
        if parsed.dry_run:
            screen.show(_rendered_report(self.session.render(text, parsed.ask)))
            return
        self._ask(text, parsed)

    def _ask(self, text: str, parsed: CellLine) -> None:
        with interrupts_in_a_line("%%llm was interrupted."), self.session.answers_bound(parsed.out):
            generation = self.session.ask(text, parsed.ask)
        if generation.display_format == "code" and (code := extract_code(generation.text)):
            self.notebook.set_next_input(code)

    def _expand(self, text: str) -> str:
        """The text with its expressions replaced; what was cut or left alone is shown."""
        return self._noted(interpolate(text, self.notebook.lookup))

    def _argument(self, word: str) -> str:
        """The same for a word of a command, where one expression by itself is never meant as it stands."""
        found = interpolate(word, self.notebook.lookup)
        if found.text == word and found.notes and _ONE_EXPRESSION.fullmatch(word):
            raise OptionError(f"{found.notes[0]}.", "Define the variable first, or write its value.")
        return self._noted(found)

    def _noted(self, found: Interpolated) -> str:
        if found.notes:
            self.session.screen.show(line_report("\n".join(found.notes)))
        return found.text


def _screen(ui: UI, session: Session) -> Screen:
    formats = session.plugins.formats
    if ui == "rich":
        from llm_magic.widgets.screen import RichScreen  # a fifth of a second that a terminal need not wait

        return RichScreen(formats, session)
    return TextScreen(formats) if ui == "text" else NotebookScreen(formats)


def _command_name(words: list[str]) -> str:
    if not words:
        return "status"
    if words[0] in HELP_FLAGS:
        return "help"
    if len(words) > 1 and words[0][:1].isupper():
        raise OptionError(
            f"There is no command {words[0]!r}.", "A prompt goes into a cell that begins with %%llm."
        )
    return words[0]


def _rendered_report(prompt: RenderedPrompt) -> Report:
    return stack(line_report(f"{prompt.tokens} tokens:"), line_report(prompt.text))


def give_empty_cell_a_body(lines: list[str]) -> list[str]:
    """An input transformer: ``%%llm --continue`` needs no prompt, but IPython refuses an empty cell."""
    is_bare = bool(lines) and lines[0].split()[:1] == ["%%llm"] and not any(map(str.strip, lines[1:]))
    return [lines[0].rstrip("\n") + "\n", "\n"] if is_bare else lines


# IPython's word for "not while I look whether the input is complete": a person is still to type the prompt.
give_empty_cell_a_body.has_side_effects = True  # type: ignore[attr-defined]


def register(shell: InteractiveShell, session: Session) -> Callable[[], None]:
    """Register the magics, their completion and their settings with a shell.

    Returns
    -------
    unregister
        Takes everything back.
    """
    from llm_magic.completion import make_matcher

    magics = LLMMagic(shell, session)
    configurables: list[Any] = shell.configurables
    shell.register_magics(magics)
    shell.events.register("post_run_cell", magics.notebook.record_error)
    matcher = make_matcher(session)
    shell.Completer.custom_matchers.append(matcher)
    shell.input_transformers_cleanup.insert(0, give_empty_cell_a_body)

    def unregister() -> None:
        session.close()
        session.screen.close()
        shell.input_transformers_cleanup.remove(give_empty_cell_a_body)
        shell.Completer.custom_matchers.remove(matcher)
        shell.events.unregister("post_run_cell", magics.notebook.record_error)
        configurables.remove(magics)
        manager = shell.magics_manager
        manager.registry.pop(type(magics).__name__, None)
        for kind in ("line", "cell"):
            manager.magics[kind].pop("llm", None)
        shell.user_ns.pop(LAST, None)

    return unregister
