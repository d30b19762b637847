"""The live picture of the machine, with the path of a token's bytes."""

from __future__ import annotations

from llm_magic.states import machine_state
from llm_magic.views.machine import machine_report
from llm_magic.views.report import LiveMachine, Report
from llm_magic.widgets.channel import new_view
from llm_magic.wire import Command, MachineState


class MachineScreen:
    """A picture that was taken once; the view lets it move."""

    def __init__(self, live: LiveMachine) -> None:
        self.view = new_view()
        self._live = live

    def state(self) -> MachineState:
        """The machine and the path."""
        return machine_state(self._live.machine, self._live.plan, self._live.model)

    def report(self) -> Report:
        """The same as static text and HTML."""
        return machine_report(self._live.machine)

    def hear(self, command: Command) -> None:
        """There is nothing to do but to show it."""

    def observe(self, event: object) -> None:
        """The picture stays as it was taken."""
