"""The live picture of the machine, with the path of a token's bytes."""

from __future__ import annotations

from dataclasses import replace

from llm_magic.placing import Moved
from llm_magic.session import Unloaded
from llm_magic.states import machine_state
from llm_magic.views.machine import machine_report
from llm_magic.views.report import LiveMachine, Report
from llm_magic.widgets.channel import Channel, new_view
from llm_magic.wire import Command, MachineState, StateEvent


class MachineScreen:
    """A picture that was taken once; the path in it follows the model."""

    def __init__(self, live: LiveMachine, channel: Channel) -> None:
        self.view = new_view()
        self._live, self._channel = live, channel

    def state(self) -> MachineState:
        """The machine and the path."""
        return machine_state(self._live.machine, self._live.plan, self._live.model)

    def report(self) -> Report:
        """The same as static text and HTML."""
        return machine_report(self._live.machine, self._live)

    def hear(self, command: Command) -> None:
        """There is nothing to do but to show it."""

    def observe(self, event: object) -> None:
        """The model was moved, or is gone and takes its path along."""
        if isinstance(event, Moved) and event.name == self._live.model:
            self._live = replace(self._live, plan=event.after)
        elif isinstance(event, Unloaded) and event.name == self._live.model:
            self._live = replace(self._live, plan=None, model="")
        else:
            return
        self._channel.post(StateEvent(view=self.view, state=self.state()))
