"""``from llm_magic import llm``: the same session from Python code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from typing import Any

from llm_magic.errors import OptionError, interrupts_in_a_line
from llm_magic.events import RenderedPrompt, Sampling
from llm_magic.options import AskOptions
from llm_magic.placing import Moved, Target
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.screen import SilentScreen
from llm_magic.session import LoadedModel, Session, Unloaded

_SAMPLING = {field.name for field in fields(Sampling)} - {"extra"}
_OPTIONS = {
    field.name: str if "str" in str(field.type) else bool
    for field in fields(AskOptions)
    if field.name != "sampling"
}
# Names of ``%%llm``'s options -> the field of ``AskOptions``, and whether that says the same or the opposite.
_RENAMED = {
    "format": ("output_format", True),
    "continue_": ("continue_last", True),
    "no_history": ("history", False),
    "no_template": ("use_template", False),
    "no_stream": ("stream", False),
}
_UNTIL_STOPPED_S = 0.05
_ELSEWHERE = {
    "out": "Write: answer = llm(…)",
    "dry_run": "llm.render(…) gives the final prompt and its length.",
}


class LLM:
    """The session behind the magics, callable.

    Examples
    --------
    >>> from llm_magic import llm
    >>> llm("Say hello.", temperature=0)  # doctest: +SKIP
    'Hello!'
    """

    def __init__(self) -> None:
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The session; made on first use."""
        if self._session is None:
            self._session = Session()
        return self._session

    @property
    def model(self) -> Any:
        """The current model as its library knows it: the torch module."""
        return self.session.model().engine.model

    @property
    def plan(self) -> Plan:
        """The current model's placement."""
        return self.session.model().plan

    @interrupts_in_a_line("llm.load was interrupted.")
    def load(self, source: str | PathLike[str], name: str = "", **options: Any) -> LoadedModel:
        """Load a model and make it the current one.

        Parameters
        ----------
        source
            A hub id, a folder, a ``.gguf`` file, or ``"starter"``.
        name
            What to call it; ``--as`` of ``%llm load``.
        **options
            The others of ``%llm load``, with underscores: ``max_memory={"cpu": "24GiB"}``,
            ``device_map="balanced"`` or a map, ``ctx_size=16384``, ``quantize="nf4"``.

        Raises
        ------
        LLMMagicError
            When it cannot be loaded; what was loaded before stays.
        """
        from llm_magic.commands.source_options import options_from_python  # with all commands, 90 ms

        return self.session.load(*options_from_python(source, options), name)

    @interrupts_in_a_line("llm.unload was interrupted.")
    def unload(self, name: str = "") -> Unloaded:
        """Close a model, the current one without a name, and give its memory back; its chats stay."""
        return self.session.unload(name)

    @interrupts_in_a_line("llm was interrupted.")
    def __call__(self, prompt: str = "", **options: Any) -> Generation:
        """Answer a prompt, without showing it.

        Parameters
        ----------
        prompt
            The text; nothing in it is replaced.
        **options
            Those of ``%%llm`` with underscores (``temperature=0``, ``chat="a"``, ``no_history=True``,
            ``continue_=True``); any other name goes to the backend, as ``--param`` does.
        """
        with self.session.answers_bound():
            return self.session.ask(prompt, _ask_options(options), SilentScreen().answer(""))

    @interrupts_in_a_line("llm.render was interrupted.")
    def render(self, prompt: str = "", **options: Any) -> RenderedPrompt:
        """The final prompt and its length in tokens, without running the model; options as for a prompt."""
        return self.session.render(prompt, _ask_options(options))

    async def agenerate(self, prompt: str = "", **options: Any) -> Generation:
        """The same for ``await``: the event loop goes on meanwhile; cancelling it stops the answer, and waits for that."""
        import asyncio  # 30 ms that only this needs

        answer = asyncio.ensure_future(asyncio.to_thread(self, prompt, **options))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            # Or the next prompt would find a model at work. There is nothing to stop before it has begun.
            while not answer.done():
                self.stop()
                await asyncio.wait([answer], timeout=_UNTIL_STOPPED_S)
            answer.exception()  # or asyncio says that nobody asked for it
            raise

    def stop(self) -> bool:
        """End the answer that ``agenerate`` is waiting for; it returns what came. False when there is none."""
        return self.session.stop()

    @interrupts_in_a_line("llm.move was interrupted.")
    def move(self, blocks: str, device: str) -> Moved:
        """Move blocks of the current model (``"layers.20-31"``) to a device; it stays loaded."""
        return self.session.move(blocks, device)

    @interrupts_in_a_line("llm.apply was interrupted.")
    def apply(self, placement: Target) -> Moved:
        """Place the current model anew: a policy or a ``.json`` file by name, a device map, or a plan."""
        return self.session.apply(placement)

    @interrupts_in_a_line("llm.undo was interrupted.")
    def undo(self) -> Moved:
        """Take the last ``move`` or ``apply`` back."""
        return self.session.undo()

    @interrupts_in_a_line("llm.view was interrupted.")
    def view(self, name: str = "map") -> Any:
        """A live view as a widget of its own: ``"map"`` of the current model, or ``"machine"``.

        For hosts of the anywidget standard beside Jupyter, and for layouts of ipywidgets; in a
        notebook ``%llm map`` and ``%llm machine`` show the same.
        """
        from llm_magic.widgets.alone import view_widget

        return view_widget(self.session, name)

    @interrupts_in_a_line("llm.close was interrupted.")
    def close(self) -> None:
        """Unload everything and begin with a new session."""
        if self._session is not None:
            self._session.close()
            self._session = None


def _ask_options(options: Mapping[str, Any]) -> AskOptions:
    """Options as ``%%llm`` names them; ``None`` stands for a default, and any other name is for the backend."""
    chosen: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in options.items():
        if name in _SAMPLING:
            sampling[name] = value
        elif name in _ELSEWHERE:
            raise OptionError(f"{name} is no option in Python.", _ELSEWHERE[name])
        elif name == "raw":
            _check_raw(value)
        elif name in _RENAMED or name in _OPTIONS:
            field_name, is_as_said = _RENAMED.get(name, (name, True))
            chosen |= _option(name, value, field_name, is_as_said)
        else:
            extra[name] = value
    return AskOptions(**chosen, sampling=sampling | ({"extra": extra} if extra else {}))


def _check_raw(value: object) -> None:
    if value not in (True, None):
        raise OptionError(
            "In Python nothing in a prompt is replaced.", 'Write an f-string: llm(f"… {name} …")'
        )


def _option(name: str, value: Any, field_name: str, is_as_said: bool) -> dict[str, Any]:
    """The field of ``AskOptions`` that an option sets; none for ``None``."""
    if value is None:
        return {}
    kind = _OPTIONS[field_name]
    if not isinstance(value, kind):
        raise OptionError(
            f"{name} cannot be {value!r}.", "Give a text." if kind is str else "Give True or False."
        )
    return {field_name: value if is_as_said else not value}


llm = LLM()
