"""``from llm_magic import llm``: the same session from Python code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llm_magic.events import Sampling
from llm_magic.options import AskOptions
from llm_magic.placing import Moved, Target
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.screen import SilentScreen
from llm_magic.session import Session

_SAMPLING = {field.name for field in fields(Sampling)} - {"extra"}
_OPTIONS = {field.name for field in fields(AskOptions)} - {"sampling"}
_NEGATIVE = {"no_history": "history", "no_template": "use_template"}


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

    def __call__(self, prompt: str, **options: Any) -> Generation:
        """Answer a prompt, without showing it.

        Parameters
        ----------
        prompt
            The text; nothing in it is replaced.
        **options
            Those of ``%%llm`` with underscores (``temperature=0``, ``chat="a"``, ``no_history=True``);
            any other name goes to the backend, as ``--param`` does.
        """
        return self.session.ask(prompt, _ask_options(options), SilentScreen().answer(""))

    async def agenerate(self, prompt: str, **options: Any) -> Generation:
        """The same for ``await``: the event loop goes on meanwhile; cancelling it stops the answer."""
        import asyncio  # 30 ms that only this needs

        try:
            return await asyncio.to_thread(self, prompt, **options)
        except asyncio.CancelledError:
            self.stop()
            raise

    def stop(self) -> bool:
        """End the answer that ``agenerate`` is waiting for; it returns what came. False when there is none."""
        return self.session.stop()

    def move(self, blocks: str, device: str) -> Moved:
        """Move blocks of the current model (``"layers.20-31"``) to a device; it stays loaded."""
        return self.session.move(blocks, device)

    def apply(self, placement: Target) -> Moved:
        """Place the current model anew: a policy or a ``.json`` file by name, a device map, or a plan."""
        return self.session.apply(placement)

    def undo(self) -> Moved:
        """Take the last ``move`` or ``apply`` back."""
        return self.session.undo()

    def view(self, name: str = "map") -> Any:
        """A live view as a widget of its own: ``"map"`` of the current model, or ``"machine"``.

        For hosts of the anywidget standard beside Jupyter, and for layouts of ipywidgets; in a
        notebook ``%llm map`` and ``%llm machine`` show the same.
        """
        from llm_magic.widgets.alone import view_widget

        return view_widget(self.session, name)

    def close(self) -> None:
        """Unload everything and begin with a new session."""
        if self._session is not None:
            self._session.close()
            self._session = None


def _ask_options(options: dict[str, Any]) -> AskOptions:
    options = dict(options)
    if "format" in options:
        options["output_format"] = options.pop("format")
    for flag, name in _NEGATIVE.items():
        if flag in options:
            options[name] = not options.pop(flag)
    sampling = {name: value for name, value in options.items() if name in _SAMPLING}
    extra = {name: value for name, value in options.items() if name not in _SAMPLING | _OPTIONS}
    chosen = {name: value for name, value in options.items() if name in _OPTIONS}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    return AskOptions(**chosen, sampling=sampling | ({"extra": extra} if extra else {}))


llm = LLM()
