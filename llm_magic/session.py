"""The one mutable object: loaded models, chats, defaults, past answers, and the jobs that change them."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from llm_magic.answer import Answer, generate_clean
from llm_magic.asking import Ending, build_request, follow, make_footprint, system_of
from llm_magic.calibration import Calibration, calibrate, kept_constants
from llm_magic.chat import Chat, Chats, check_chat_name
from llm_magic.errors import (
    EngineError,
    LLMMagicError,
    OptionError,
    PlanError,
    SessionError,
)
from llm_magic.events import Message, PhaseEvent, Progress, RenderedPrompt, Request
from llm_magic.folders import cache_folder, make_private
from llm_magic.hookspecs import Backend, Engine, FindsAccelerators, Planner
from llm_magic.host.probe import probe_machine, read_machine
from llm_magic.jobs import Jobs
from llm_magic.machine import Device, Link, Machine
from llm_magic.memory import FreeMemory
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.notebook import Notebook
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.origin import Origin
from llm_magic.placing import Moved, Target, as_if_unloaded, carry_out, limits_of, refusal_to_move
from llm_magic.plan import Plan, PlannedEvent, Workload
from llm_magic.planning.budget import device_name
from llm_magic.planning.constants import Constants
from llm_magic.planning.planner import make_plan, read_device_map, refusal, with_room_for_prompts
from llm_magic.planning.select import edited, select_blocks
from llm_magic.plugins import Plugins, pick
from llm_magic.result import Footprint, Generation, Turn
from llm_magic.screen import AnswerView, MakeProgress, QuietAnswer, Screen, SilentScreen
from llm_magic.settings import Settings
from llm_magic.worker import Cancelled

Result = TypeVar("Result")
DEFAULTS = AskOptions()
LAST = "_llm"
"""The variable that holds the last answer."""
_LONGEST_NAME = 100  # characters
_SHORTEST_CONTEXT = 1024  # tokens; below that a chat is no use


@dataclass
class LoadedModel:
    """A model in memory, the name it goes by, how fast its last answer was, and where it was before."""

    name: str
    origin: Origin
    engine: Engine
    load_s: float
    last: Footprint | None = None
    history: list[Plan] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        """Which model the user asked for."""
        return self.origin.spec

    @property
    def options(self) -> LoadOptions:
        """And how to load it."""
        return self.origin.options

    def __repr__(self) -> str:
        return f"<LoadedModel {self.name}: {self.plan.layout.name}>"

    @property
    def plan(self) -> Plan:
        """Where everything is now; the engine moves blocks by itself when memory runs out."""
        return self.engine.plan


@dataclass(frozen=True)
class Unloaded:
    """What an unload gave back: bytes by device, and the variables that still hold the model."""

    name: str
    freed: Mapping[str, int]
    held_by: tuple[str, ...] = ()


class Session:
    """Everything that changes while a notebook works with models.

    Parameters
    ----------
    plugins, settings, screen, notebook
        What the session works with; each has a default that needs no notebook.
    """

    def __init__(
        self,
        plugins: Plugins | None = None,
        settings: Settings | None = None,
        screen: Screen | None = None,
        notebook: Notebook | None = None,
    ) -> None:
        self.plugins = plugins or Plugins()
        self.settings = settings or Settings()
        self.screen: Screen = screen or SilentScreen()
        self.notebook = notebook or Notebook()
        self.models: dict[str, LoadedModel] = {}
        self.current = ""
        self.chats = Chats()
        self.log: list[Generation] = []
        self.aliases: dict[str, str] = {}
        self._jobs = Jobs()

    # Models

    def model(self, name: str = "") -> LoadedModel:
        """The loaded model of this name; the current one without a name.

        Raises
        ------
        SessionError
            When nothing is loaded.
        OptionError
            When no loaded model has this name.
        """
        if not self.models:
            raise SessionError(
                "No model is loaded.",
                "%llm load starter, or any hub id, folder or .gguf file; llm.load(…) in Python.",
            )
        return pick(self.models, name or self.current, "loaded model")

    def machine(self, measure: bool = False) -> Machine:
        """The machine we are on: what it has, what is free now, and how fast bytes move."""
        folder = make_private(cache_folder())
        return probe_machine(self._accelerators, measure=measure, disk_folder=folder)

    def plan(self, spec: ModelSpec, options: LoadOptions, progress: Progress = lambda _: None) -> Plan:
        """Place a model without loading it.

        Raises
        ------
        LLMMagicError
            When the source, the options or the device map are invalid. A plan that does not fit
            is returned, with its ``problems``.
        """
        spec = self._named(spec)
        backend = self.plugins.backend_for(spec)
        progress(PhaseEvent("reading"))
        layout = backend.layout(spec, progress)
        progress(PhaseEvent("planning"))
        machine = read_machine(Path(options.machine)) if options.machine else self.machine()
        placement, policy = self._placement(options.device_map, layout, machine)
        constants = kept_constants(layout, machine)

        def planned(context: int, of_a_pass: int = options.ubatch_size or Workload.prefill_tokens) -> Plan:
            return make_plan(
                layout,
                machine,
                Workload(context, prefill_tokens=of_a_pass),
                placement=placement,
                policy=policy,
                max_memory=options.max_memory,
                source=spec.source,
                options=_backend_options(spec, options),
                constants=constants,
            )

        def with_room(context: int) -> Plan:
            plan = planned(context)
            return plan if options.ubatch_size else with_room_for_prompts(plan, partial(planned, context))

        if options.ctx_size:
            return with_room(options.ctx_size)
        return _with_longest_context(with_room, self._default_context(layout.context_length))

    def replan(self, plan: Plan, target: Target, max_memory: Mapping[str, int]) -> Plan:
        """Another placement of a model that is planned and not loaded, on the machine as it was then.

        Parameters
        ----------
        target
            As ``propose`` takes it.
        max_memory
            Device -> bytes.

        Raises
        ------
        LLMMagicError
            When the target is none. A plan that does not fit is returned, with its ``problems``.
        """
        return self._placed(plan, plan.machine, target, max_memory, kept_constants(plan.layout, plan.machine))

    def load(
        self, spec: ModelSpec, options: LoadOptions, name: str = "", view: MakeProgress | None = None
    ) -> LoadedModel:
        """Plan and load a model, make it the current one, and give it a name.

        Loading the same source with the same options again keeps the model that is there, as long as the files
        are those that it was loaded from. A model of the same name is unloaded once the new one is loaded. ``view`` shows the progress; the
        session's screen makes one without it.

        Raises
        ------
        LLMMagicError
            When it cannot be loaded; what was loaded before stays.
        KeyboardInterrupt
            When the user interrupts; what was read so far is given back.
        """
        if options.machine:
            raise OptionError(
                "A described machine can only be planned for.", "Add --dry-run, or leave --machine out."
            )
        spec = self._named(spec)
        name = _check_model_name(name or _model_name(spec.source))
        same, origin = self.models.get(name), Origin.of(spec, options, self.settings.ctx_size)
        if same and same.origin == origin:
            self.current = name
            return same
        backend = self.plugins.backend_for(spec)
        loaded = self._jobs.run(
            f"Loading {name}",
            lambda progress: self._load(backend, origin, name, progress),
            view or self.screen.progress,
            undo=lambda model: model.engine.close(),
        )
        if same:
            self.unload(name)
        self.models[name] = loaded
        self.current = name
        self.plugins.notify(self, loaded)
        return loaded

    def unload(self, name: str = "") -> Unloaded:
        """Close a model and give its memory back; its chats stay.

        Raises
        ------
        SessionError
            When nothing is loaded, or the model is busy.
        """
        model = self.model(name)
        owner = object()
        try:
            self._jobs.begin(owner)
            before = FreeMemory.now(self._accelerators)
            del self.models[model.name]
            torch_module = model.engine.model
            self.notebook.drop_references(torch_module)
            held_by = tuple(self.notebook.names_of(torch_module)) if torch_module is not None else ()
            del torch_module
            model.engine.close()
            freed = FreeMemory.now(self._accelerators).gained_since(before)
        finally:
            try:
                self._jobs.end(owner)
            finally:  # no worker ends it, if an interrupt comes just there
                self._jobs.end(owner)
        if self.current == model.name:
            self.current = next(reversed(self.models), "")
        unloaded = Unloaded(model.name, freed, held_by)
        self.plugins.notify(self, unloaded)
        return unloaded

    def use(self, name: str) -> LoadedModel:
        """Make a loaded model the current one."""
        model = self.model(name)
        self.current = model.name
        return model

    def bench(self, name: str = "", machine_only: bool = False) -> Calibration:
        """Measure the machine, and a loaded model on it; later plans are made with what was found.

        Raises
        ------
        LLMMagicError
            When no loaded model has this name, or one is at work.
        """
        model = self.model(name) if name or (self.models and not machine_only) else None

        def job(progress: Progress) -> Calibration:
            progress(PhaseEvent("measuring"))
            if model is None:
                return Calibration(self.machine(measure=True))
            engine = model.engine
            with _in_words(f"{model.name} could not be measured", "%llm bench --machine-only leaves it out."):
                return calibrate(
                    model.name,
                    engine,
                    lambda: as_if_unloaded(self.machine(measure=True), engine.memory()),
                    progress,
                )

        return self.run("Measuring", job)

    def run(self, title: str, job: Callable[[Progress], Result]) -> Result:
        """Run a job that reports progress (a download, a measurement), showing it; interruptible."""
        return self._jobs.run(title, job, self.screen.progress)

    def close(self) -> None:
        """Unload everything."""
        for name in list(self.models):
            self.unload(name)

    # Placement

    def propose(self, target: Target, name: str = "", max_memory: Mapping[str, int] | None = None) -> Plan:
        """The plan that ``apply`` would carry out; nothing moves.

        Parameters
        ----------
        target
            A policy or a ``.json`` file by name, a device map, or a plan of the same model.
        name
            A loaded model; the current one without a name.
        max_memory
            Device -> bytes; ``None`` keeps the limits of the plan that is in force.

        Raises
        ------
        LLMMagicError
            When the target is none, or no model is loaded. A plan that does not fit is returned,
            with its ``problems``.
        """
        model = self.model(name)
        now = model.plan
        machine = as_if_unloaded(self.machine(), model.engine.memory())
        limits = limits_of(now) if max_memory is None else max_memory
        return self._placed(now, machine, target, limits, kept_constants(now.layout, machine))

    def apply(
        self,
        target: Target,
        name: str = "",
        max_memory: Mapping[str, int] | None = None,
        view: MakeProgress | None = None,
    ) -> Moved:
        """Place a loaded model anew: only blocks whose place changes move; chats stay.

        Parameters are those of ``propose``; ``view`` shows the progress, and the session's screen
        makes one without it.

        Raises
        ------
        LLMMagicError
            When the target is none, does not fit or cannot be reached; everything is where it was.
        KeyboardInterrupt
            When the user interrupts; everything is back where it was.
        """
        model = self.model(name)
        before = model.plan
        moved = self._move(model, lambda: self.propose(target, model.name, max_memory), view)
        if moved.count:
            model.history.append(before)
        return moved

    def move(
        self, blocks: str, device: str, name: str = "", max_memory: Mapping[str, int] | None = None
    ) -> Moved:
        """Move some blocks of a loaded model, such as ``layers.20-31``, to a device; see ``apply``."""
        return self.apply(self.edited(blocks, device, name), name, max_memory)

    def edited(self, blocks: str, device: str, name: str = "") -> dict[str, str]:
        """A loaded model's device map with some blocks on another device.

        Raises
        ------
        PlanError
            When no block or no device is meant by the words.
        OptionError
            When the blocks are named by anything but a text.
        """
        plan = self.model(name).plan
        if not isinstance(blocks, str):
            raise OptionError(f"{blocks!r} names no blocks.", "Give a text, such as 'layers.20-31'.")
        home = device_name(device, plan.machine)
        return edited(plan, {block.name: home for block in select_blocks(plan.layout, blocks)})

    def undo(self, name: str = "") -> Moved:
        """Bring a loaded model back to its placement before the last ``apply`` or ``move``.

        Raises
        ------
        SessionError
            When there is none.
        LLMMagicError
            When that placement does not fit any more.
        """
        model = self.model(name)
        if not model.history:
            raise SessionError(
                f"There is nothing to undo for {model.name}.",
                "%llm move BLOCKS DEVICE and %llm apply PLAN place it anew.",
            )
        past = model.history[-1]
        moved = self._move(model, lambda: self.propose(past, model.name, limits_of(past)))
        model.history.pop()
        return moved

    # Prompts

    def ask(self, text: str, options: AskOptions = DEFAULTS, view: AnswerView | None = None) -> Generation:
        """Answer a prompt with a loaded model, showing it in ``view`` as it comes.

        Returns
        -------
        Generation
            Also appended to ``log``; its turn is added to the chat in which it began, if that is still there.

        Raises
        ------
        LLMMagicError
            When the prompt or an option is invalid, or the engine fails. The chat stays as it was.
        KeyboardInterrupt
            After the partial answer was kept in ``log`` and in the chat.
        """
        model = self.model(options.model)
        output_format = pick(
            self.plugins.formats, options.output_format or self.settings.format, "format"
        ).name
        chat = self._chat(options)
        request = build_request(text, options, chat, self.settings)
        beginning = request.messages[-1].content if request.continue_last else ""
        answer = Answer(beginning, model.name)
        view = view or self.screen.answer(output_format, model.name, model.plan)
        view = view if options.stream else QuietAnswer(view)
        worker = self._jobs.worker(lambda stop: generate_clean(model.engine.generate, request, answer, stop))
        answer.stop = worker.stop

        def show(answer: Answer) -> None:
            view.update(answer)
            self.plugins.notify(self, answer)

        before = model.plan
        try:
            self._jobs.begin(worker)
            with self._answering(chat, make_current=not options.chat):
                ending = follow(worker, answer, show, model.name)
                if model.plan is not before:  # memory ran out, and blocks moved
                    model.history.append(before)
                    model.last = None
                generation = self._generation(model, answer, ending, request, output_format)
                if chat is not None:
                    self._add_turn(generation, chat, request)
                generation = generation.with_continuation(self.continued_by(generation))
                self._keep(generation)
        finally:
            self._jobs.end_unless_started(worker)
        view.close(generation)
        if ending.error is not None:
            raise ending.error
        return generation

    @contextmanager
    def answers_bound(self, *names: str) -> Iterator[None]:
        """Bind the last answer that is made in here, also one that was cut short, to ``_llm`` and to ``names``."""
        asked = len(self.log)
        try:
            yield
        finally:
            for generation in self.log[asked:][-1:]:
                self.notebook.namespace.update({name: generation for name in (LAST, *names) if name})

    def stop(self) -> bool:
        """End what is at work, softly: ``ask`` returns what came, a job is cancelled. False when nothing is.

        For another thread than the one that waits: a button, an event loop.
        """
        return self._jobs.stop()

    def render(self, text: str, options: AskOptions = DEFAULTS) -> RenderedPrompt:
        """The final prompt that ``ask`` would send, without running the model."""
        model = self.model(options.model)
        return model.engine.render(build_request(text, options, self._chat(options), self.settings))

    def continued_by(self, generation: Generation) -> str:
        """The line of a prompt cell that would go on with a past answer now; empty where none would.

        It was cut short, its chat still ends with it and has room for more, and its model is loaded.
        """
        turn, model = generation.turn, generation.footprint.model
        chat = self.chats.in_memory(turn.chat)
        last = [Message("user", turn.prompt), Message("assistant", generation.text)]
        if chat is None or chat.messages[-2:] != last or model not in self.models or not generation.can_go_on:
            return ""
        words = ["%%llm -c"]
        words += [f"--chat {shlex.quote(chat.name)}"] if chat is not self.chats.current else []
        words += [f"-m {model}"] if model != self.current else []
        words += ["--no-template"] if not turn.use_template else []
        return " ".join(words)

    def forget_chat(self, chat: str) -> None:
        """Drop the KV caches that engines keep for a chat."""
        for model in self.models.values():
            model.engine.forget(chat)

    # Inside

    def _accelerators(self, measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        devices: dict[str, Device] = {}
        links: dict[tuple[str, str], Link] = {}
        for backend in self.plugins.backends.values():
            if isinstance(backend, FindsAccelerators):
                found, found_links = backend.accelerators(measure)
                devices |= {d.id: d for d in found if d.id not in devices}
                links |= {(k.source, k.target): k for k in found_links}
        return tuple(devices.values()), tuple(links.values())

    def _named(self, spec: ModelSpec) -> ModelSpec:
        """The spec with its aliases resolved.

        Raises
        ------
        OptionError
            When a model is to be its own draft.
        """
        source, draft = (self.aliases.get(text, text) for text in (spec.source, spec.draft))
        if draft and _is_same_source(source, draft):
            raise OptionError(
                "A model cannot draft for itself.",
                "Give --draft a smaller model of the same family, or leave it out.",
            )
        return replace(spec, source=source, draft=draft)

    def _placement(
        self, target: Target, layout: ModelLayout, machine: Machine
    ) -> tuple[Planner | Mapping[str, str], str]:
        """What a planner takes for a target, and the name under which plans show it."""
        if isinstance(target, Plan):
            return target.device_map, target.policy
        if isinstance(target, Mapping):
            if not all(isinstance(block, str) for block in target):
                raise PlanError(
                    "A device map names its blocks in text.", 'Write it like {"": "cpu", "layers.3": "disk"}.'
                )
            return target, "hand"
        if not isinstance(target, str):
            raise OptionError(
                f"{target!r} is no placement.", "Give a policy, a .json file, a device map or a plan."
            )
        if target.lower().endswith(".json"):
            return read_device_map(Path(target), layout, machine), Path(target).name
        return pick(self.plugins.planners, target, "placement policy"), target

    def _placed(
        self,
        plan: Plan,
        machine: Machine,
        target: Target,
        max_memory: Mapping[str, int],
        constants: Constants,
    ) -> Plan:
        placement, policy = self._placement(target, plan.layout, machine)
        return make_plan(
            plan.layout,
            machine,
            plan.workload,
            placement=placement,
            policy=policy,
            max_memory=max_memory,
            source=plan.source,
            options=plan.options,
            constants=constants,
        )

    def _move(
        self, model: LoadedModel, propose: Callable[[], Plan], view: MakeProgress | None = None
    ) -> Moved:
        before = model.plan

        def job(progress: Progress) -> Moved:
            progress(PhaseEvent("planning"))
            plan = propose()
            if not plan.fits:
                raise refusal_to_move(plan)
            with _in_words("The blocks could not be moved", "Everything is where it was; %llm map shows it."):
                return carry_out(model.name, model.engine, plan, progress)

        moved = self._jobs.run(
            f"Moving blocks of {model.name}",
            job,
            view or self.screen.progress,
            undo=lambda _: model.engine.apply(before, lambda _: None),
        )
        if moved.count:
            model.last = None  # measured where the blocks are no more
        self.plugins.notify(self, moved)
        return moved

    def _default_context(self, context_length: int) -> int:
        wanted: int = self.settings.ctx_size
        return min(wanted, context_length) if context_length else wanted

    def _load(self, backend: Backend, origin: Origin, name: str, progress: Progress) -> LoadedModel:
        started = time.perf_counter()
        plan = self.plan(origin.spec, origin.options, progress)
        if not plan.fits:
            raise refusal(plan)
        progress(PlannedEvent("loading", plan=plan))
        engine = backend.load(origin.spec, plan, progress)
        try:
            if (warm_up := getattr(engine, "warm_up", None)) is not None:
                warm_up(progress)
        except BaseException:
            engine.close()
            raise
        return LoadedModel(name, origin, engine, time.perf_counter() - started)

    def _chat(self, options: AskOptions) -> Chat | None:
        wanted = options.chat or options.new or options.continue_last
        if options.history is False and wanted:
            raise OptionError(
                "--no-history goes with neither --chat, --new nor --continue.", "Leave one out."
            )
        if not wanted and not (self.settings.history if options.history is None else options.history):
            return None
        if options.new:
            return self.chats.begin(options.chat)
        if options.chat:
            return self.chats.find(options.chat) or Chat(check_chat_name(options.chat))
        return self.chats.current

    def _generation(
        self, model: LoadedModel, answer: Answer, ending: Ending, request: Request, output_format: str
    ) -> Generation:
        footprint = make_footprint(answer, ending, request, model.name, model.plan)
        if footprint.generation_tps:
            model.last = footprint
        question = next((m.content for m in reversed(request.messages) if m.role == "user"), "")
        options = asdict(request.sampling)
        turn = Turn(question, system_of(request), request.chat, options, request.use_template)
        has_failed = ending.reason == "error" and answer.text == answer.beginning
        return Generation("" if has_failed else answer.text, ending.reason, footprint, turn, output_format)

    @contextmanager
    def _answering(self, chat: Chat | None, make_current: bool) -> Iterator[None]:
        """Around an answer in a conversation, or in none: it ends there, whatever commands came meanwhile."""
        if chat is None:
            yield
            return
        with self.chats.answering(chat, make_current):
            yield
        if not self.chats.holds(chat):  # nobody goes on from what the engine has kept of it
            self.forget_chat(chat.name)

    def _add_turn(self, generation: Generation, chat: Chat, request: Request) -> None:
        if generation.finish_reason == "error" or (generation.is_partial and not generation):
            return
        messages = [m for m in request.messages if m.role != "system"]
        if request.continue_last:
            messages.pop()
        chat.messages[:] = [*messages, Message("assistant", generation.text)]
        chat.system = system_of(request)

    def _keep(self, generation: Generation) -> None:
        if generation or generation.finish_reason != "error":
            self.log.append(generation)
            self.plugins.notify(self, generation)


@contextmanager
def _in_words(what: str, next_step: str) -> Iterator[None]:
    """Say in our words what an engine raised in its own."""
    try:
        yield
    except (LLMMagicError, Cancelled):
        raise
    except Exception as error:
        raise EngineError(f"{what}: {type(error).__name__}: {error}", next_step) from error


def _with_longest_context(planned: Callable[[int], Plan], wanted: int) -> Plan:
    """The first plan that fits, for ``wanted`` tokens of context, then half, then a quarter of them.

    Nobody asked for this context length: a shorter one is better than a refusal.
    """
    first = plan = planned(wanted)
    context = wanted
    while not plan.fits and context >= 2 * _SHORTEST_CONTEXT:
        context //= 2
        plan = planned(context)
    if not plan.fits:
        return first
    if context == wanted:
        return plan
    note = f"Planned for {context} tokens of context: {wanted} would not fit. -c N sets another length."
    return replace(plan, warnings=(note, *plan.warnings))


def _backend_options(spec: ModelSpec, options: LoadOptions) -> dict[str, str]:
    values = {"offload_folder": options.offload_folder, "dtype": spec.dtype, "revision": spec.revision or ""}
    values |= {"quantize": spec.quantize, "quantize-head": spec.quantize_head, "draft": spec.draft}
    return {name: value for name, value in values.items() if value}


def _is_same_source(source: str, draft: str) -> bool:
    paths = Path(source).expanduser(), Path(draft).expanduser()
    return source == draft or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def _model_name(source: str) -> str:
    """A name for what is loaded without one: of a folder that it has, whatever leads there (``.``, ``..``, ``~``)."""
    with suppress(OSError, RuntimeError, ValueError):  # no folder, but maybe something that a backend knows
        if (path := Path(source).expanduser()).exists():
            source = os.path.abspath(path)
    name = source.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf")).strip("-.")
    return name[:_LONGEST_NAME] or "model"


def _check_model_name(name: str) -> str:
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not re.fullmatch(r"\w[\w.:-]*", name):
        raise OptionError(f"{name!r} cannot name a model.", "Use letters, digits, dots, '-' and '_'.")
    return name
