"""The live memory map of one model, and the editor in it: proposals, and what is done when one is applied."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from llm_magic.answer import Answer
from llm_magic.errors import LLMMagicError, SessionError
from llm_magic.hookspecs import ExpressesPlacement
from llm_magic.options import LoadOptions
from llm_magic.placing import Moved, Target, changed
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.session import LoadedModel, Session, Unloaded
from llm_magic.states import map_state, plan_state
from llm_magic.views.map import map_report
from llm_magic.views.report import LiveMap, Report
from llm_magic.widgets.channel import Channel, new_view
from llm_magic.widgets.progress import ProgressPoster
from llm_magic.wire import (
    AppliedEvent,
    Apply,
    Command,
    FailedEvent,
    MapState,
    MeasuredEvent,
    Placement,
    ProposalEvent,
    Propose,
    StateEvent,
    Status,
    Stop,
    SweepEvent,
)


class MapScreen:
    """A memory map that follows its model, and takes edits.

    Parameters
    ----------
    live
        What to show: a loaded model by name, or a plan that can be loaded.
    redraw
        Called when the static HTML beneath is not true any more.
    """

    def __init__(
        self, live: LiveMap, session: Session, channel: Channel, redraw: Callable[[], None] = lambda: None
    ) -> None:
        self.view = new_view()
        self._live, self._session, self._channel, self._redraw = live, session, channel, redraw
        self._model: LoadedModel | None = session.models.get(live.model)
        self._plan = live.plan
        self._is_gone = False
        self._at_work = threading.Lock()

    # What it shows

    @property
    def plan(self) -> Plan:
        """The placement that is in force, was in force last, or is planned."""
        if self._model is not None and not self._is_gone:
            self._plan = self._model.plan
        return self._plan

    def state(self) -> MapState:
        """The map as it is now."""
        model = self._model
        status: Status = "unloaded" if self._is_gone else "loaded" if model else "planned"
        return map_state(
            self.plan,
            model=model.name if model else "",
            status=status,
            memory=model.engine.memory() if model and not self._is_gone else None,
            last=model.last if model else None,
            policies=list(self._session.plugins.planners),
            backend=self._expressed(self.plan),
        )

    def report(self) -> Report:
        """The same as static text and HTML."""
        if self._is_gone:
            return map_report(self.plan, note="This model was unloaded.")
        return map_report(self.plan, self._model.engine.memory() if self._model else None)

    # What it hears

    def hear(self, command: Command) -> None:
        """Answer a proposal, begin to apply one, or cancel what was begun."""
        if isinstance(command, Propose):
            self._answer(command.seq, lambda: self._propose(command))
        elif isinstance(command, Apply):
            # On a thread of its own: the one that brings messages must bring Cancel as well.
            run = contextvars.copy_context().run
            job = threading.Thread(
                target=run, args=(self._apply, command), name="llm_magic apply", daemon=True
            )
            job.start()
        elif isinstance(command, Stop) and self._at_work.locked():
            self._session.stop()

    def observe(self, event: object) -> None:
        """Follow the model: moved, unloaded, at work."""
        model = self._model
        if model is None or self._is_gone:
            return
        if isinstance(event, Answer) and event.model == model.name:
            self._show_sweep(event)
        elif isinstance(event, Unloaded) and event.name == model.name:
            self._is_gone = self._session.models.get(model.name) is not model
            self._refresh()
        elif isinstance(event, Moved) and event.name == model.name:
            self._refresh()
        elif isinstance(event, Generation) and event.footprint.model == model.name:
            self._show_measured(model)

    # Inside

    def _refresh(self) -> None:
        self._channel.post(StateEvent(view=self.view, state=self.state()))
        self._redraw()

    def _show_measured(self, model: LoadedModel) -> None:
        last = model.last
        self._channel.post(
            MeasuredEvent(
                view=self.view,
                measured_tps=last.generation_tps if last else 0.0,
                tokens_per_sweep=last.tokens_per_sweep if last else 0.0,
                limit_share=last.limit_share if last else 0.0,
                now={device: dict(held) for device, held in model.engine.memory().items()},
            )
        )

    def _show_sweep(self, answer: Answer) -> None:
        if answer.sweep is not None and answer.sweep is not self._shown_sweep:
            self._shown_sweep = answer.sweep
            self._channel.post(SweepEvent(view=self.view, times=list(answer.sweep.times)))

    _shown_sweep: object = None

    def _answer(self, seq: int, act: Callable[[], None]) -> None:
        """Do something for a person at a screen, and tell them when it cannot be done."""
        try:
            act()
        except LLMMagicError as error:
            self._failed(seq, error)
        except Exception as error:
            self._failed(seq, SessionError(f"{type(error).__name__}: {error}", "Run the cell again."))

    def _failed(self, seq: int, error: LLMMagicError) -> None:
        self._channel.post(
            FailedEvent(view=self.view, seq=seq, message=error.message, next_step=error.next_step)
        )

    def _propose(self, command: Propose) -> None:
        now, plan = self.plan, self._proposed(command.placement)
        moving = [
            new for old, new in zip(now.placements, plan.placements, strict=True) if old.home != new.home
        ]
        self._channel.post(
            ProposalEvent(
                view=self.view,
                seq=command.seq,
                plan=plan_state(
                    plan,
                    before=now,
                    model=self._model.name if self._model else "",
                    backend=self._expressed(plan),
                ),
                changed=len(changed(now, plan)),
                moved_bytes=sum(place.block.bytes for place in moving),
            )
        )

    def _proposed(self, placement: Placement) -> Plan:
        if self._is_gone:
            raise SessionError("This model was unloaded.", "Load it again.")
        target = _target(placement)
        if self._model is None:
            return self._session.replan(self.plan, target, placement.limits)
        return self._session.propose(target, self._model.name, placement.limits)

    def _apply(self, command: Apply) -> None:
        if not self._at_work.acquire(blocking=False):
            self._failed(
                command.seq, SessionError("A placement is being applied.", "Wait for it, or cancel it.")
            )
            return
        try:
            self._answer(command.seq, lambda: self._carry_out(command))
        finally:
            self._at_work.release()

    def _carry_out(self, command: Apply) -> None:
        progress = ProgressPoster(self._channel, self.view)
        if self._is_gone:
            raise SessionError("This model was unloaded.", "Load it again.")
        if self._model is None:
            model = self._load(command.placement, progress)
            count, seconds = len(model.plan.placements), model.load_s
        else:
            moved = self._session.apply(
                _target(command.placement), self._model.name, command.placement.limits, progress
            )
            count, seconds = moved.count, moved.seconds
        self._channel.post(AppliedEvent(view=self.view, seq=command.seq, changed=count, seconds=seconds))

    def _load(self, placement: Placement, progress: ProgressPoster) -> LoadedModel:
        live = self._live
        if live.spec is None:
            raise SessionError("This plan cannot be loaded.", "%llm load SOURCE loads a model.")
        if self.plan.machine.described:
            raise SessionError(
                "The plan is for another machine.", "%llm plan without --machine plans for this one."
            )
        options = LoadOptions(
            device_map=placement.policy or dict(placement.homes) or live.options.device_map,
            max_memory=placement.limits,
            ctx_size=self.plan.workload.context_length,
            offload_folder=live.options.offload_folder,
        )
        self._model = self._session.load(live.spec, options, view=progress)
        self._refresh()
        return self._model

    def _expressed(self, plan: Plan) -> str:
        """What the backend calls this placement, where it has words of its own."""
        spec = self._model.spec if self._model else self._live.spec
        if spec is None:
            return ""
        backend = self._session.plugins.backend_for(spec)
        return backend.express(plan) if isinstance(backend, ExpressesPlacement) else ""


def _target(placement: Placement) -> Target:
    if placement.policy.lower().endswith(".json"):
        raise SessionError("A front end names no files.", "%llm apply FILE.json applies a file.")
    return placement.policy or dict(placement.homes)
