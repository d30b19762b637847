"""What makes the sweeps of a placed model few and quick: proposals to verify, and captured steps.

Both depend on where the blocks are, so they are made anew whenever blocks have moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from llm_magic.backends.accelerate.decoding.capturable import (
    has_layers_alone,
    has_plain_cache,
    layers_to_capture,
    model_reason,
    why_not,
)
from llm_magic.backends.accelerate.decoding.capture import CapturedSteps
from llm_magic.backends.accelerate.decoding.captured_layers import CapturedLayers
from llm_magic.backends.accelerate.decoding.cuda_graphs import CudaGraphs
from llm_magic.backends.accelerate.decoding.kv_cache import can_take_back
from llm_magic.backends.accelerate.decoding.pace import Pace
from llm_magic.backends.accelerate.decoding.proposers import DraftModel, PromptLookup
from llm_magic.backends.accelerate.decoding.speculate import Speculation
from llm_magic.backends.accelerate.decoding.static_cache import SWEEP_TOKENS
from llm_magic.backends.accelerate.decoding.warmup import COMPILING, WarmUp, regional, resident_layers
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.memory_errors import free_bytes
from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.preparation import clock
from llm_magic.backends.accelerate.recorded.layers import RecordedLayers
from llm_magic.backends.accelerate.recorded.recordings import Recordings
from llm_magic.errors import OptionError
from llm_magic.plan import Plan

_EXPERTS_OF_A_SWEEP = 32
"""Packed ones that a GPU multiplies in each layer of a sweep that is recorded, the same one for two tokens twice."""


class Quick:
    """The quick ways of one placed model.

    Parameters
    ----------
    placed
        The model.
    context
        Tokens that its KV cache is planned for.
    draft
        A small resident model of the same vocabulary; ``None``: none.
    draft_name
        What to call it.

    Attributes
    ----------
    steps
        Captured steps; ``None`` where they cannot be.
    """

    def __init__(self, placed: PlacedModel, context: int, draft: Any = None, draft_name: str = "") -> None:
        self.steps: CapturedSteps | None = None
        self._placed, self._context = placed, context
        self._why_not = ""
        self._warm_up: WarmUp | None = None
        self._draft: DraftModel | None = None
        self._draft_layers: RecordedLayers | None = None
        if draft is not None:
            self._draft = DraftModel(draft, _vocabulary(placed.model), _steps_of(draft, context), context)
            if draft.device.type == "cpu" and cpu_products.is_there():
                self._draft_layers = RecordedLayers(_layers_of(draft), Recordings(), context)
        self._draft_model, self._draft_name = draft, draft_name
        self._lookup, self._pace = PromptLookup(), Pace(clock=clock)
        self._recorded: RecordedLayers | None = None
        self._recordings = Recordings()
        self._can_verify = can_take_back(placed.model)
        self.after_move()

    def speculation(self, config: Any) -> Speculation | None:
        """Who proposes tokens for an answer.

        Unasked, the text itself where blocks travel: a sweep then costs the same for one token as for
        several. Elsewhere nobody: kernels for several tokens round a little differently, so that a
        near tie of a 16-bit model may fall the other way.

        Parameters
        ----------
        config
            Its generation config; ``prompt_lookup_num_tokens`` is the most that may be proposed, and 0
            switches proposals off. It is taken out: transformers would choose another loop for it.

        Raises
        ------
        OptionError
            When that is no whole number, or the model cannot verify proposals.
        """
        most, config.prompt_lookup_num_tokens = config.prompt_lookup_num_tokens, None
        if most is not None and (type(most) is not int or most < 0):
            raise OptionError(
                f"prompt_lookup_num_tokens cannot be {most!r}.", "Give a whole number; 0 switches it off."
            )
        if most == 0:
            return None
        if not self._can_verify:
            if most:
                raise OptionError(
                    "This model cannot take tokens back once it has read them, so none can be proposed.",
                    "Leave prompt_lookup_num_tokens out.",
                )
            return None
        if most is not None:
            return Speculation(PromptLookup(), Pace(most, clock))
        if self._draft is None and not self._placed.travels:
            return None
        return Speculation(self._draft or self._lookup, self._pace)

    def status(self) -> tuple[str, ...]:
        """How sweeps are run, in a few words each."""
        said = list(self._warm_up.status if self._warm_up else ())
        if self._placed.plan.machine.gpus:  # nobody expects a captured step of a CPU
            said.insert(0, self.steps.status if self.steps else f"eager decode: {self._why_not}")
        if self._recorded and (recorded := self._recorded.status):
            said.append(f"{recorded} on the CPU" if self._placed.plan.machine.gpus else recorded)
        if self._draft:
            said.append(f"draft {self._draft_name}")
        elif self._placed.travels and self._can_verify:
            said.append("prompt lookup")
        return tuple(said)

    def rest(self) -> None:
        """After an answer, however it ended."""
        for recorded in (self._recorded, self._draft_layers):
            if recorded:
                recorded.rest()

    def tensors(self) -> Iterator[Any]:
        """KV caches at fixed addresses, and the draft model's."""
        if self.steps:
            yield from self.steps.tensors()
        if self._draft:
            yield from self._draft.tensors()

    def draft_parameters(self) -> Iterator[Any]:
        """The draft model's weights."""
        if self._draft_model is not None:
            yield from self._draft_model.parameters()

    def before_move(self) -> None:
        """Let go of everything that holds addresses of blocks. Tokens go back to their cache."""
        if self._recorded:
            self._recorded.undo()
        if self.steps:
            self.steps.close()
        self.steps = self._warm_up = self._recorded = None

    def after_move(self) -> None:
        """Begin anew with blocks where they are now."""
        self._pace.forget()
        placed = self._placed
        self._recorded = (
            RecordedLayers(_of_the_cpu(placed), self._recordings, self._context)
            if cpu_products.is_there()
            else None
        )
        self._why_not = why_not(placed.model, placed.plan, placed.lanes)
        if not self._why_not and placed.tables.has_adapters:
            self._why_not = "an adapter is on a table that is not on the GPU"
        layers = layers_to_capture(placed.model, placed.plan)
        if self._why_not and not layers:
            return
        import torch

        device, most = torch.device(placed.plan.placements[0].compute), _most_tokens(placed.plan)
        self._pace.forget(most - 1)
        self._warm_up = _warm_up(placed, compiles=not layers)
        if layers:
            self.steps = CapturedLayers(
                placed.model,
                self._context,
                device,
                layers,
                lambda on: CudaGraphs(on, frees_memory=False),
                most_tokens=min(most, placed.plan.long_sweep - 1) if placed.plan.long_sweep else most,
                warm_up=self._warm_up,
            )
            return
        self.steps = CapturedSteps(
            placed.model,
            self._context,
            CudaGraphs(device),
            device,
            lanes=placed.lanes,
            lookups=placed.tables.lookups,
            settle=placed.settle,
            most_tokens=most,
            warm_up=self._warm_up,
        )

    @property
    def calls_model(self) -> bool:
        """Whether steps run the model block by block."""
        return self.steps is not None and self.steps.calls_model

    @contextmanager
    def without_compiler(self, most_s: float) -> Iterator[bool]:
        """While it lasts, no layers begin to be compiled in the background.

        ``False`` when some are all the same, after a wait of so many seconds at most.
        """
        with self._warm_up.held() if self._warm_up else nullcontext():
            is_alone = COMPILING.acquire(timeout=most_s)
            if is_alone:
                COMPILING.release()
            yield is_alone

    def step(self, cache: Any, batch: int, tokens: int) -> Any:
        """A captured step for such a sweep, if there is one now: blocks may move in the midst of an answer."""
        return self.steps.step(cache, batch, tokens) if self.steps else None

    @property
    def records_in_ram(self) -> bool:
        """Whether layers are recorded, and nothing has to come from elsewhere for a sweep."""
        is_alone = all(place.compute == "cpu" for place in self._placed.plan.placements)
        return self._recorded is not None and is_alone and not self._placed.travels

    def give_back(self, length: int) -> None:
        """Put the first ``length`` tokens into the cache again."""
        if self.steps:
            self.steps.give_back(length)

    def give_way(self, needed: int) -> None:
        """Let fixed addresses of the last answer go where a prompt that needs so many bytes has no room beside them.

        Reading it would fail and begin anew.
        """
        steps = self.steps
        if steps and steps.holds_memory and any(needed > free_bytes(gpu) for gpu in steps.gpus):
            steps.free()

    def prepare(self, room: int) -> None:
        """Before an answer of at most ``room`` tokens, its prompt included."""
        if self.steps:
            self.steps.prepare(room)

    def free(self) -> bool:
        """Give up memory that a captured step can have again at once; whether there was any."""
        has_freed = self.steps is not None and self.steps.free()
        return (self._draft is not None and self._draft.free()) or has_freed

    def reset(self) -> None:
        """After an error."""
        if self.steps:
            self.steps.reset()

    def close(self) -> None:
        """Give everything back."""
        self.before_move()
        if self._draft:
            self._draft.close()
        self._draft = self._draft_model = None


def _of_the_cpu(placed: PlacedModel) -> dict[str, Any]:
    """Layers that compute on the CPU, for one token at least."""
    names = (p.block.name for p in placed.plan.placements if p.block.kind == "decoder" and p.compute == "cpu")
    return {name: placed.blocks[name].module for name in names if name in placed.blocks}


def _layers_of(draft: Any) -> dict[str, Any]:
    """The layers of a model that is nowhere but in RAM."""
    kinds = set(draft._no_split_modules or ())
    return {name: module for name, module in draft.named_modules() if type(module).__name__ in kinds}


def _most_tokens(plan: Plan) -> int:
    """Tokens of a sweep that is recorded.

    A GPU multiplies packed experts one by one for each token: with more of them a sweep is recorded for seconds, to a
    graph of many thousand kernels, for which plans have no room, and to verify them takes as long as to generate them.
    """
    of_a_token = [
        place.block.active_experts
        for place in plan.placements
        if place.block.experts and place.compute != "cpu" and not place.is_split
    ]
    if not plan.layout.quantization or not of_a_token:
        return SWEEP_TOKENS[-1]
    return max(1, min(SWEEP_TOKENS[-1], _EXPERTS_OF_A_SWEEP // max(of_a_token)))


def _steps_of(draft: Any, context: int) -> CapturedSteps | None:
    """Captured steps of a draft model: it is small, so launching its kernels is most of what it takes."""
    if draft.device.type != "cuda" or model_reason(draft) or not has_plain_cache(draft):
        return None
    return CapturedSteps(draft, context, CudaGraphs(draft.device), draft.device)


def _warm_up(placed: PlacedModel, *, compiles: bool) -> WarmUp:
    """Faster layers, where the GPU decides how long a sweep takes: where blocks travel, the bus does."""
    layers = {} if placed.travels else resident_layers(placed.model, placed.plan)
    # transformers runs experts in another way while an answer comes than when they would be compiled.
    has_experts = any(place.block.experts for place in placed.plan.placements)
    compiles = compiles and has_layers_alone(placed.model, placed.plan) and not has_experts
    return WarmUp(layers, regional if layers and compiles else None)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
