"""The live memory map of one model, and the editor in it: proposals, and what is done when one is applied."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from llm_magic.answer import Answer
from llm_magic.errors import LLMMagicError, SessionError
from llm_magic.hookspecs import ExpressesPlacement
from llm_magic.placing import Moved, Target, changed
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.screen import ProgressView
from llm_magic.session import LoadedModel, Session
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
    Hello,
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
        self._plan = self._drawn = live.plan
        self._was_loaded = self._model is not None
        self._is_seen = False
        self._shown_sweep: object = None
        self._at_work = threading.Lock()
        self._cancel: Callable[[], None] | None = None

    # What it shows

    @property
    def model(self) -> LoadedModel | None:
        """The loaded model; ``None`` before it is loaded, and for ever once it is gone."""
        if self._model is not None and self._session.models.get(self._model.name) is not self._model:
            self._model = None  # another one of its name is not it
        return self._model

    @property
    def plan(self) -> Plan:
        """The placement that is in force, was in force last, or is planned."""
        if self.model is not None:
            self._plan = self.model.plan
        return self._plan

    def state(self) -> MapState:
        """The map as it is now."""
        model = self.model
        status: Status = "loaded" if model else "unloaded" if self._was_loaded else "planned"
        return map_state(
            self.plan,
            model=model.name if model else "",
            status=status,
            memory=_held(model),
            last=model.last if model else None,
            policies=list(self._session.plugins.planners),
            backend=self._expressed(self.plan),
        )

    def report(self) -> Report:
        """The same as static text and HTML."""
        self._drawn = self.plan
        note = "This model was unloaded." if self._was_loaded and self.model is None else ""
        return map_report(self.plan, _held(self.model), note=note)

    # What it hears

    def hear(self, command: Command) -> None:
        """Answer a proposal, begin to apply one, or cancel what was begun."""
        if isinstance(command, Hello):
            self._is_seen = True
        elif isinstance(command, Propose):
            self._answer(command.seq, lambda: self._propose(command))
        elif isinstance(command, Apply):
            # On a thread of its own: the one that brings messages must bring Cancel as well.
            run = contextvars.copy_context().run
            job = threading.Thread(
                target=run, args=(self._apply, command), name="llm_magic apply", daemon=True
            )
            job.start()
        elif isinstance(command, Stop) and self._cancel is not None:
            self._cancel()

    def observe(self, event: object) -> None:
        """Follow the model: moved, unloaded, at work."""
        before, model = self._model, self.model
        if before is None:
            return
        if model is None:
            self._refresh()
        elif isinstance(event, Answer) and event.model == model.name:
            self._show_sweep(event)
        elif isinstance(event, Generation) and event.footprint.model == model.name:
            self._show_measured(model)
        elif isinstance(event, Moved) and event.name == model.name:
            self._refresh()

    # Inside

    def _refresh(self) -> None:
        self._channel.post(StateEvent(view=self.view, state=self.state()))
        self._redraw()

    def _show_measured(self, model: LoadedModel) -> None:
        if model.plan is not self._drawn:  # memory ran out, and the engine moved blocks by itself
            self._refresh()
        last = model.last
        self._channel.post(
            MeasuredEvent(
                view=self.view,
                measured_tps=last.generation_tps if last else 0.0,
                tokens_per_sweep=last.tokens_per_sweep if last else 0.0,
                limit_share=last.limit_share if last else 0.0,
                now={device: dict(held) for device, held in _held(model).items()},
            )
        )

    def _show_sweep(self, answer: Answer) -> None:
        if self._is_seen and answer.sweep is not None and answer.sweep is not self._shown_sweep:
            self._shown_sweep = answer.sweep
            self._channel.post(SweepEvent(view=self.view, times=list(answer.sweep.times)))

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
        state = plan_state(
            plan,
            before=now,
            model=self._model.name if self._model else "",
            backend=self._expressed(plan),
        )
        self._channel.post(
            ProposalEvent(
                view=self.view,
                seq=command.seq,
                plan=state,
                changed=len(changed(now, plan)),
                moved_bytes=sum(place.block.bytes for place in moving),
            )
        )

    def _proposed(self, placement: Placement) -> Plan:
        self._require_model()
        if self.model is None:
            return self._session.replan(self.plan, self._target(placement), placement.limits)
        return self._session.propose(self._target(placement), self.model.name, placement.limits)

    def _apply(self, command: Apply) -> None:
        if not self._at_work.acquire(blocking=False):
            busy = SessionError("A placement is being applied.", "Wait for it, or cancel it.")
            self._failed(command.seq, busy)
            return
        try:
            self._answer(command.seq, lambda: self._carry_out(command))
        finally:
            self._cancel = None
            self._at_work.release()

    def _carry_out(self, command: Apply) -> None:
        self._require_model()
        target, limits = self._target(command.placement), command.placement.limits
        if self.model is None:
            model = self._load(target, limits)
            count, seconds = len(model.plan.placements), model.load_s
        else:
            moved = self._session.apply(target, self.model.name, limits, self._progress)
            count, seconds = moved.count, moved.seconds
        self._channel.post(AppliedEvent(view=self.view, seq=command.seq, changed=count, seconds=seconds))

    def _progress(self, _title: str, cancel: Callable[[], None]) -> ProgressView:
        self._cancel = cancel
        return ProgressPoster(self._channel, self.view)

    def _load(self, target: Target, limits: Mapping[str, int]) -> LoadedModel:
        live = self._live
        if live.spec is None:
            raise SessionError("This plan cannot be loaded.", "%llm load SOURCE loads a model.")
        if self.plan.machine.described:
            raise SessionError(
                "The plan is for another machine.", "%llm plan without --machine plans for this one."
            )
        options = replace(
            live.options,
            device_map=target if isinstance(target, str | Mapping) else target.device_map,
            max_memory=limits,
            ctx_size=self.plan.workload.context_length,
        )
        self._model = self._session.load(live.spec, options, live.name, self._progress)
        self._was_loaded = True
        self._refresh()
        return self._model

    def _require_model(self) -> None:
        if self._was_loaded and self.model is None:
            raise SessionError("This model was unloaded.", "Load it again.")

    def _target(self, placement: Placement) -> Target:
        """A policy, or all homes; what the placement does not name stays."""
        if placement.policy.lower().endswith(".json"):
            raise SessionError("A front end names no files.", "%llm apply FILE.json applies a file.")
        now = {place.block.label: place.home for place in self.plan.placements}
        return placement.policy or now | dict(placement.homes)

    def _expressed(self, plan: Plan) -> str:
        """What the backend calls this placement, where it has words of its own."""
        spec = self._model.spec if self._model else self._live.spec
        if spec is None:
            return ""
        backend = self._session.plugins.backend_for(spec)
        return backend.express(plan) if isinstance(backend, ExpressesPlacement) else ""


def _held(model: LoadedModel | None) -> Mapping[str, Mapping[str, int]]:
    """What a model holds; nothing while that cannot be told, because it is being moved or closed."""
    try:
        return model.engine.memory() if model else {}
    except Exception:
        return {}
