"""The only JSON between Python and the front ends: states, events, and the commands that may come back.

A *state* is whole and slow, an *event* small and fast, a *command* what a person does on a screen. Every
message names its view. Commands come from a browser and are hostile until decoded: the schema is closed,
every text, list and number is capped, and no path, code or attribute name is in it.
``labextension/src/wire.ts`` is generated from this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from llm_magic.errors import OptionError
from llm_magic.events import PhaseName

BLOCKS_AT_MOST = 4096
BYTES_AT_MOST = 1 << 50
MESSAGE_BYTES_AT_MOST = 1 << 20

Label = Annotated[str, Meta(min_length=1, max_length=200)]
DeviceId = Annotated[str, Meta(min_length=1, max_length=40)]
ViewId = Annotated[str, Meta(max_length=64, pattern="^[0-9a-f]*$")]
Size = Annotated[int, Meta(ge=0, le=BYTES_AT_MOST)]
Way = Literal["resident", "streamed", "split", "cpu", "read", "kept", "looked-up", "idle"]
Status = Literal["planned", "loaded", "unloaded"]


# --- States


class BlockState(Struct, frozen=True, kw_only=True):
    """One block and what happens to it in every sweep; ``label`` is what a person reads and types.

    ``prefill`` is the device that computes it in sweeps of ``PlanState.long_sweep`` tokens and more, if another;
    ``looks_up`` says that it is a table whose rows can be looked up where it is; ``rest_bytes`` of a split block are
    where it computes, and only the other ones at home.
    """

    label: str
    kind: str
    bytes: int
    dtype: str
    home: str
    compute: str
    way: Way
    cache_bytes: int = 0
    tied_to: list[str] = []
    experts: int = 0
    active_experts: int = 0
    prefill: str = ""
    looks_up: bool = False
    rest_bytes: int = 0


class TierState(Struct, frozen=True, kw_only=True):
    """One device with its bytes by purpose, and how much of it is drawn.

    ``is_whole`` says that the bar shows all of the device; otherwise it is cut off after what is planned.
    ``now`` is what a loaded model holds there, by purpose; ``can_hold`` whether blocks may be moved there.
    """

    device: str
    kind: Literal["gpu", "cpu", "disk", "npu"]
    name: str
    total: int
    free: int
    unified: bool
    limit: int
    is_limited: bool
    is_whole: bool
    can_hold: bool
    weights: int
    split: int
    kept: int
    draft: int
    slots: int
    kv_cache: int
    activations: int
    buffers: int
    reserve: int
    other: int
    planned: int
    spare: int
    now: dict[str, int] = {}


class MoveState(Struct, frozen=True, kw_only=True):
    """Bytes that go from one device to another for every token, and how fast that way is (0: unknown)."""

    source: str
    target: str
    bytes: int
    bytes_per_s: float


class ExportState(Struct, frozen=True, kw_only=True):
    """The same placement to copy: Python, ``%llm`` commands, JSON, options of llama.cpp and of the backend.

    ``backend`` is empty where the backend places every block as the map says.
    """

    python: str
    command: str
    json: str
    llama_cpp: str
    backend: str = ""


class PlanState(Struct, frozen=True, kw_only=True):
    """A placement with its bytes, forecast and verdict. Rates are tokens per second, 0 when unknown."""

    name: str
    dtype: str
    quantization: str
    bytes: int
    parameters: int
    context_length: int
    policy: str
    fits: bool
    mapped: bool
    blocks: list[BlockState]
    tiers: list[TierState]
    moves: list[MoveState]
    decode_tps: float
    prefill_tps: float
    limit_tps: float
    bound_by: str
    warnings: list[str]
    problems: list[str]
    remedies: list[str]
    exports: ExportState
    long_sweep: int = 0


class MapState(Struct, frozen=True, kw_only=True, tag_field="type", tag="map"):
    """The memory map and editor of one model; ``model`` is empty before it is loaded."""

    model: str
    status: Status
    plan: PlanState
    policies: list[str]
    measured_tps: float = 0.0
    tokens_per_sweep: float = 0.0
    limit_share: float = 0.0


class DeviceState(Struct, frozen=True, kw_only=True):
    """One device of the machine picture; ``assumed`` names what nobody measured."""

    id: str
    kind: Literal["gpu", "cpu", "disk", "npu"]
    name: str
    total: int
    free: int
    other: int
    read_bytes_per_s: float
    flops: float
    unified: bool
    measured_on: str
    method: str
    assumed: list[str]


class LinkState(Struct, frozen=True, kw_only=True):
    """One way between two devices."""

    source: str
    target: str
    bytes_per_s: float
    name: str
    measured_on: str
    assumed: bool


class MachineState(Struct, frozen=True, kw_only=True, tag_field="type", tag="machine"):
    """The machine, and the path of one token's bytes of the current model (``model`` empty: none)."""

    name: str
    described: bool
    devices: list[DeviceState]
    links: list[LinkState]
    model: str = ""
    moves: list[MoveState] = []


class JobState(Struct, frozen=True, kw_only=True, tag_field="type", tag="job"):
    """A load, a move, a measurement at work; ``plan`` once it is known where blocks will go."""

    title: str
    plan: PlanState | None = None


class AnswerState(Struct, frozen=True, kw_only=True, tag_field="type", tag="answer"):
    """An answer that is coming: which model, and what bounds its speed."""

    model: str
    placement: dict[str, int]
    bound_by: str
    streams_text: bool


State = MapState | MachineState | JobState | AnswerState


# --- Events


class StateEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="state"):
    """A new state of a view."""

    view: str
    state: State


class HelloEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="hello"):
    """The kernel heard a ``hello`` of this view while it was at work: Stop and Cancel will be heard too."""

    view: str


class AnswerEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="answer"):
    """More of an answer. ``text`` is appended, or all there is when ``whole``.

    ``seq`` counts the events of a view from 1 on; a gap means that one was lost: say hello again.
    """

    view: str
    seq: int
    text: str
    whole: bool
    phase: PhaseName | None
    done: int
    total: int
    unit: str
    tokens: int
    elapsed_s: float
    first_token_s: float
    generation_tps: float
    tokens_per_sweep: float


class ProgressEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="progress"):
    """Where a job is. ``left_s`` is 0 when nobody can tell; ``detail`` may be the label of a block."""

    view: str
    phase: PhaseName | None
    done: int
    total: int
    unit: str
    detail: str
    elapsed_s: float
    left_s: float


class SweepEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="sweep"):
    """The newest sweep: for each block, in model order, seconds of waiting, copying and computing."""

    view: str
    times: list[tuple[float, float, float]]


class MeasuredEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="measured"):
    """How the last answer of a map's model went, and what the model holds now; fields as in the states."""

    view: str
    measured_tps: float
    tokens_per_sweep: float
    limit_share: float
    now: dict[str, dict[str, int]]


class ProposalEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="proposal"):
    """What a proposal would mean. ``changed`` counts blocks that would move; ``moved_bytes`` their bytes."""

    view: str
    seq: int
    plan: PlanState
    changed: int
    moved_bytes: int


class FailedEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="failed"):
    """A command could not be done; ``next_step`` says what to do."""

    view: str
    seq: int
    message: str
    next_step: str


class AppliedEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="applied"):
    """The placement is in force; a new state has come before. ``seconds`` is how long the engine took."""

    view: str
    seq: int
    changed: int
    seconds: float


class ClosedEvent(Struct, frozen=True, kw_only=True, tag_field="type", tag="closed"):
    """The live view ends; what the notebook holds is shown again."""

    view: str


Event = (
    StateEvent
    | HelloEvent
    | AnswerEvent
    | ProgressEvent
    | SweepEvent
    | MeasuredEvent
    | ProposalEvent
    | FailedEvent
    | AppliedEvent
    | ClosedEvent
)


# --- Commands


class Hello(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="hello"):
    """A view is on a screen (an empty view: the front end is there); asks for its state."""

    view: ViewId = ""


class Stop(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="stop"):
    """End the answer or the job of this view softly."""

    view: ViewId


class Placement(Struct, frozen=True, forbid_unknown_fields=True):
    """A target: homes of blocks by label (others stay), or a policy by name; limits by device, none else."""

    homes: Annotated[dict[Label, DeviceId], Meta(max_length=BLOCKS_AT_MOST)] = {}
    policy: Annotated[str, Meta(max_length=40)] = ""
    limits: Annotated[dict[DeviceId, Size], Meta(max_length=64)] = {}


Seq = Annotated[int, Meta(ge=0, le=1 << 53)]


class Propose(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="propose"):
    """Ask what a placement would mean; nothing moves."""

    view: ViewId
    seq: Seq
    placement: Placement


class Apply(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="apply"):
    """Move what changed, or load the model that was planned."""

    view: ViewId
    seq: Seq
    placement: Placement


Command = Hello | Stop | Propose | Apply


def decode_command(content: Any) -> Command:
    """The command in a front end's message.

    Raises
    ------
    OptionError
        When the message is none: an unknown command or field, a wrong type, too much of anything.
    """
    try:
        if len(msgspec.json.encode(content)) > MESSAGE_BYTES_AT_MOST:
            raise OptionError("A message of the front end is too large.", "Run the cell again.")
        command: Command = msgspec.convert(content, Command)
        return command
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            "The front end sent what is no command.", "Reload the page, and run the cell again."
        ) from error


def encode(message: Event | State) -> dict[str, Any]:
    """An event or a state as plain JSON values."""
    encoded: dict[str, Any] = msgspec.to_builtins(message)
    return encoded
