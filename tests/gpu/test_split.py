"""Layers of a mixture that are split: a GPU computes all of them but the experts, which the CPU does in RAM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.captured_layers import CapturedLayers  # noqa: E402
from llm_magic.backends.accelerate.decoding.cuda_graphs import Graphs  # noqa: E402
from llm_magic.backends.accelerate.placement.cpu_experts import CpuExperts  # noqa: E402
from llm_magic.backends.accelerate.placement.placed import PlacedModel  # noqa: E402
from llm_magic.backends.accelerate.repair import blocks_to_move  # noqa: E402
from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.machine import Device  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from llm_magic.plan import Placement, Plan  # noqa: E402
from llm_magic.planning.constants import Constants  # noqa: E402
from llm_magic.planning.planner import make_budget  # noqa: E402
from llm_magic.planning.setting import Setting  # noqa: E402
from llm_magic.units import GIB  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, MACHINE, ask, plan_for, request  # noqa: E402
from tests.families import save  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.gpu.test_placed import DEVICE, ON_CPU, RESIDENT, STREAMED, VISITING, layers  # noqa: E402
from tests.placements import LONG, Place, Where  # noqa: E402

SPLIT: Where = ("cpu", DEVICE, False, "", True)
VISITING_SPLIT: Where = ("cpu", DEVICE, False, DEVICE, True)
KEPT_SPLIT: Where = ("disk", DEVICE, True, DEVICE, True)
WAYS: Mapping[str, Place] = {
    "all": layers(SPLIT),
    "all, and visiting in prompts": layers(VISITING_SPLIT),
    "beside resident ones": layers(RESIDENT, VISITING_SPLIT),
    "kept": layers(KEPT_SPLIT, RESIDENT),
    "under a table in RAM": lambda n, label: (
        STREAMED if label == "embed" else layers(VISITING_SPLIT)(n, label)
    ),
}
MIXED: Mapping[str, Place] = {
    "beside the CPU's": layers(SPLIT, ON_CPU, RESIDENT),
    "beside the CPU's, all visiting in prompts": layers(VISITING_SPLIT, VISITING),
}
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8}
MIXTURES: Mapping[str, dict[str, int]] = {"qwen3-moe": {}, "many experts": {"num_experts": 64}}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {},
    "nemotron_h": {},
    "kimi_linear": {},
    "inkling_text": {},
}
PROMPT = "The capital of France is"
_MANY = 1_000_000
REPEATING = "one two three four one two three four one two three four one two"
ASKED = [
    request(PROMPT * 3, max_new_tokens=16, chat="a"),
    request("Layers live in memory", max_new_tokens=6, chat="b", temperature=1.5, seed=3),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("mixtures") / name
        if name in MIXTURES:
            return tiny.save_mixture(folder, layers=4, **WIDE | MIXTURES[name])
        return save(name, folder, **OTHERS[name])

    return cache(make)


def plan(folder: Path, way: Place, spec: ModelSpec) -> Plan:
    _, made = plan_for(folder, "ram", spec=spec)
    gpu = Device(DEVICE, "gpu", "GPU", 2 * GIB, 2 * GIB, read_bytes_per_s=1e12)
    machine = replace(MACHINE, devices=(gpu, *MACHINE.devices))
    placements = tuple(Placement(p.block, *way(n, p.block.label)) for n, p in enumerate(made.placements))
    made = replace(
        made, machine=machine, placements=placements, budget=make_budget(machine, {}), long_sweep=LONG
    )
    return replace(made, uses=Setting.of(made, Constants()).uses(placements))


@pytest.fixture
def engine_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Loads a mixture packed by a method (empty: as it is), with float32 beside that."""
    made: list[Any] = []

    def load(way: Place, method: str = "nf4", name: str = "qwen3-moe", dtype: str = "float32") -> Any:
        if method:
            pytest.importorskip("bitsandbytes" if method in ("nf4", "fp4") else "optimum.quanto")
        spec = ModelSpec(str(folder_of(name)), quantize=method, dtype=dtype)
        made.append(BACKEND.load(spec, plan(folder_of(name), way, spec), lambda _event: None))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


def answers(engine: Any) -> list[str]:
    """The last one goes on in the first one's chat."""
    found = [ask(engine, asked).text for asked in ASKED]
    more = request(PROMPT * 3, found[0], "And of Spain?", chat="a", max_new_tokens=16)
    return [*found, ask(engine, more).text]


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> Callable[..., list[str]]:
    """What a model that is all on the GPU answers."""

    @cache
    def answer(method: str = "nf4", name: str = "qwen3-moe") -> list[str]:
        spec = ModelSpec(str(folder_of(name)), quantize=method, dtype="float32")
        engine = BACKEND.load(spec, plan(folder_of(name), layers(RESIDENT), spec), lambda _event: None)
        try:
            return answers(engine)
        finally:
            engine.close()

    return answer


def experts_of(engine: Any) -> list[CpuExperts]:
    return [each for some in engine._placed._attachments._cpu_experts.values() for each in some]


def work_of(engine: Any) -> Iterator[list[int]]:
    """Counts tokens of each call of experts on the CPU."""
    calls: list[int] = []
    for each in experts_of(engine):
        compute = each._compute

        def counted(values: Any, named: Any, compute: Any = compute) -> Any:
            calls.append(len(values[0]))
            return compute(values, named)

        each._compute = counted  # type: ignore[method-assign]
    yield calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["nf4", "fp4", "quanto-int8", "float8", "int2"])
def test_the_same_tokens_as_on_the_gpu(
    method: str, way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    """A step is recorded: graphs, and the work of the CPU between them."""
    engine = engine_of(WAYS[way], method)
    for _ in range(2):
        assert answers(engine) == expected(method)
        assert engine.status() == ("captured decode",)


def test_moves_of_what_a_gpu_orders_in_another_way(
    engine_of: Callable[..., Any], folder_of: Callable[[str], Path]
) -> None:
    """Of int4 in bfloat16, each part is in the order of what computes it."""
    engine = engine_of(layers(SPLIT), "int4", dtype="bfloat16")
    first = answers(engine)
    for way in (
        layers(RESIDENT),
        layers(SPLIT, ON_CPU),
        layers(ON_CPU),
        layers(RESIDENT, SPLIT),
        layers(SPLIT),
    ):
        engine.apply(plan_in(engine, way), lambda _event: None)
        assert all(answers(engine))
    assert answers(engine) == first
    assert engine.status() == ("captured decode",)


@pytest.mark.parametrize("way", MIXED)
def test_beside_layers_of_the_cpu(
    way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    """Then each layer is recorded by itself, split ones in parts."""
    engine = engine_of(MIXED[way])
    for _ in range(2):
        assert answers(engine) == expected()
        assert engine.status()[0] == "captured layers"
    assert engine.status() == ("captured layers", "recorded layers on the CPU")
    steps = engine._quick.steps
    assert isinstance(steps, CapturedLayers)
    places = {place.block.name: place for place in engine.plan.placements}
    on_gpu = {i for i, b in enumerate(engine.plan.layout.layers) if places[b.name].compute == DEVICE}
    assert {key[0] for key in steps._layer_graphs} == on_gpu


def test_beside_blocks_that_stream(engine_of: Callable[..., Any], expected: Callable[..., list[str]]) -> None:
    """A graph that ends in the midst of a sweep would leave a copy on its way."""
    engine = engine_of(lambda n, label: STREAMED if label == "head" else layers(SPLIT, RESIDENT)(n, label))
    for _ in range(2):
        assert answers(engine) == expected()
        assert engine.status()[0] == "captured layers"


@pytest.mark.parametrize("way", [*WAYS, *MIXED])
def test_experts_that_are_not_packed(
    way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    """Where they come to the GPU for prompts, all of them are taken one after the other, and nothing is recorded."""
    engine = engine_of({**WAYS, **MIXED}[way], "")
    for _ in range(2):
        assert answers(engine) == expected("")
    visits = any(place.prefill for place in engine.plan.placements)
    assert ("eager decode" in engine.status()[0]) == visits


@pytest.mark.parametrize("name", OTHERS)
def test_other_mixtures(name: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]) -> None:
    """With biases, shared experts, dense layers, states, windows and routers of other kinds."""
    for way in (layers(SPLIT), layers(VISITING_SPLIT, RESIDENT)):
        engine = engine_of(way, "quanto-int8", name)
        assert answers(engine) == expected("quanto-int8", name)


def test_the_gpu_computes_them_in_prompts(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(WAYS["all, and visiting in prompts"])
    calls = next(work_of(engine))
    ask(engine, request(PROMPT * 3, max_new_tokens=4))
    assert set(calls) == {1}
    cache = engine._placed._attachments._expert_lanes[DEVICE].cache
    assert cache.misses > 0
    fetched = cache.misses
    ask(engine, request("a", max_new_tokens=4, chat="short"))  # fewer tokens than a long sweep has
    assert cache.misses == fetched


def test_memory_is_as_planned(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(layers(SPLIT, RESIDENT))
    held, use = engine.memory(), engine.plan.use(DEVICE)
    assert held[DEVICE]["weights"] == use.weights + use.split
    assert held["cpu"]["weights"] == engine.plan.use("cpu").weights
    resident = sum(p.block.bytes for p in engine.plan.placements if p.home == DEVICE)
    split = [p for p in engine.plan.placements if p.is_split]
    assert use.weights == resident
    assert use.split == sum(p.block.bytes - p.block.expert_bytes for p in split)
    tensors = Counter(str(p.device) for p in engine.model.parameters())
    assert set(tensors) == {DEVICE, "cpu"}
    for place in split:
        block = engine.model.get_submodule(place.block.name)
        for name, parameter in block.named_parameters():
            assert str(parameter.device) == ("cpu" if ".experts." in name else DEVICE), name


@pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")
@pytest.mark.parametrize("method", ["nf4", "quanto-int8", ""])
def test_experts_take_no_room_of_the_gpu_while_a_model_is_loaded(
    method: str, engine_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one at a time, to be packed."""
    most = []
    usual = PlacedModel._put_parts

    def put(self: Any, *args: Any) -> None:
        most.append(torch.cuda.max_memory_allocated(DEVICE) - before)
        usual(self, *args)
        most.append(torch.cuda.max_memory_allocated(DEVICE) - before)

    monkeypatch.setattr(PlacedModel, "_put_parts", put)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    engine = engine_of(layers(SPLIT), method, "many experts")
    use, block = engine.plan.use(DEVICE), engine.plan.layout.layers[0]
    rest = block.bytes - block.expert_bytes
    one = 4 * 2 * 128 * 256  # gate and up of an expert in float32
    assert max(most) < use.weights + use.split + rest + 3 * one < use.weights + use.split + block.bytes


def test_proposals_are_verified(engine_of: Callable[..., Any], folder_of: Callable[[str], Path]) -> None:
    """Sweeps of several tokens: the CPU takes all of them at once."""
    wanted = engine_of(layers(RESIDENT))
    asked = request(REPEATING, max_new_tokens=30, extra={"prompt_lookup_num_tokens": 5})
    right = ask(wanted, asked)
    engine = engine_of(layers(RESIDENT, SPLIT))
    calls = next(work_of(engine))
    found = ask(engine, asked)
    assert found.text == right.text
    assert found.finish.sweeps < found.finish.generated_tokens
    assert max(calls[len(experts_of(engine)) :]) > 1  # after the prompt
    assert engine.status()[0] == "captured decode"
    visiting = engine_of(WAYS["all, and visiting in prompts"])
    assert ask(visiting, asked).text == right.text
    assert visiting.status()[0] == "captured decode"  # in sweeps that are as long as a prompt that visits


def test_chats_go_on_over_moves(engine_of: Callable[..., Any], expected: Callable[..., list[str]]) -> None:
    """Only what changes its place is moved: of a split layer that goes to the GPU, its experts."""
    engine = engine_of(layers(RESIDENT))
    plans = {
        name: plan_in(engine, way)
        for name, way in {**WAYS, **MIXED, "resident": layers(RESIDENT), "cpu": layers(ON_CPU)}.items()
    }
    before = engine.plan
    for name in (
        "all",
        "resident",
        "kept",
        "all",
        "cpu",
        "beside resident ones",
        "cpu",
        "beside the CPU's",
        "resident",
    ):
        moved = dict(engine.apply(plans[name], lambda _event: None))
        assert moved == _bytes_moved(before, plans[name]), name
        assert answers(engine) == expected(), name
        before = engine.plan
    again = ask(engine, request(PROMPT * 3, max_new_tokens=16, chat="a"))
    assert again.finish.cached_tokens > 0


def plan_in(engine: Any, way: Place) -> Plan:
    placements = tuple(
        Placement(p.block, *way(n, p.block.label)) for n, p in enumerate(engine.plan.placements)
    )
    made = replace(engine.plan, placements=placements)
    return replace(made, uses=Setting.of(made, Constants()).uses(placements))


def _bytes_moved(before: Plan, after: Plan) -> dict[tuple[str, str], int]:
    moved = Counter[tuple[str, str]]()
    for old, new in zip(before.placements, after.placements, strict=True):
        experts = new.block.expert_bytes
        rests = [place.compute if place.is_split else place.home for place in (old, new)]
        moved[old.home, new.home] += experts
        moved[rests[0], rests[1]] += new.block.bytes - experts
    return {(source, target): size for (source, target), size in moved.items() if source != target and size}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("both", [False, True])
def test_on_another_gpu_than_the_current_one(
    both: bool, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    there: Where = ("cpu", "cuda:1", False, "cuda:1", True)
    rest: Where = ("cuda:1", "cuda:1", False, "")

    def place(number: int, label: str) -> Where:
        if not label.startswith("layers."):
            return rest
        return VISITING_SPLIT if both and number % 2 else there

    engine = engine_of(place)
    for _ in range(2):
        assert answers(engine) == expected()
    assert engine.status() == ("captured layers" if both else "captured decode",)


@pytest.mark.parametrize("name", ["qwen3-moe", "nemotron_h", "kimi_linear"])
def test_work_that_fails_in_a_step_that_was_recorded(
    name: str,
    engine_of: Callable[..., Any],
    expected: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that runs out is mended, and the step is done once more: no state has its token twice."""
    engine = engine_of(layers(SPLIT), "quanto-int8", name)
    assert answers(engine) == expected("quanto-int8", name)
    assert engine.status()[0] == "captured decode"
    usual, count = CpuExperts._compute, len(experts_of(engine))
    for nth in (count + 1, 2 * count, 4 * count + 2):
        left = nth

        def fail(self: CpuExperts, values: Any, named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return usual(self, values, named)

        monkeypatch.setattr(CpuExperts, "_compute", fail)
        found = ask(engine, ASKED[0])
        monkeypatch.setattr(CpuExperts, "_compute", usual)
        assert found.text == expected("quanto-int8", name)[0], nth
        assert found.finish.notes
        assert answers(engine) == expected("quanto-int8", name), nth


def test_an_interrupt_between_two_graphs_ends_the_answer(
    engine_of: Callable[..., Any], expected: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls, usual = engine_of(layers(SPLIT)), 0, Graphs.interrupt

    def interrupt(self: Graphs, work: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            self.capture_end()
            raise KeyboardInterrupt
        usual(self, work)

    monkeypatch.setattr(Graphs, "interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(engine, ASKED[0])
    assert answers(engine) == expected()
    assert engine.status() == ("captured decode",)


def test_layers_in_ram_give_way_to_the_disk(engine_of: Callable[..., Any]) -> None:
    engine = engine_of(layers(SPLIT))
    chosen = blocks_to_move(engine.plan, "cpu")
    assert chosen
    assert all(place.is_split for place in chosen)


@pytest.mark.parametrize("way", ["all", "all, and visiting in prompts"])
def test_an_adapter_on_experts_is_refused(
    way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    peft = pytest.importorskip("peft")
    engine = engine_of(WAYS[way], "")
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM")
    with pytest.raises(EngineError, match="changes experts"):
        engine.model.add_adapter(config)
    assert answers(engine) == expected("")
    resident = engine_of(layers(RESIDENT), "")
    resident.model.add_adapter(config)
    with pytest.raises(EngineError, match="changes experts"):
        resident.apply(plan_in(resident, WAYS[way]), lambda _event: None)
    assert {place.way for place in resident.plan.placements} == {"resident"}
    assert all(answers(resident))


@pytest.mark.parametrize("way", ["all, and visiting in prompts", "beside the CPU's, all visiting in prompts"])
def test_a_stop_or_an_error_anywhere_leaves_the_next_answer_right(
    way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    engine = engine_of({**WAYS, **MIXED}[way])
    experts = experts_of(engine)
    for nth in (1, 2, len(experts) + 1, 4 * len(experts) + 1):
        for error in (KeyboardInterrupt(), RuntimeError("no")):
            left = nth
            usual = CpuExperts._compute

            def fail(
                self: CpuExperts, values: Any, named: Any, error: Any = error, usual: Any = usual
            ) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise error
                return usual(self, values, named)

            CpuExperts._compute = fail  # type: ignore[method-assign]
            try:
                with pytest.raises((KeyboardInterrupt, EngineError)):
                    ask(engine, request(PROMPT * 3, max_new_tokens=16, chat="a"))
            finally:
                CpuExperts._compute = usual  # type: ignore[method-assign]
            assert answers(engine) == expected()


def test_memory_that_is_not_pinned(
    engine_of: Callable[..., Any], expected: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU records no copy from or to it: the layers run as they are then."""
    monkeypatch.setattr("llm_magic.backends.accelerate.placement.cpu_experts.pin", lambda _memory: False)
    engine = engine_of(layers(SPLIT, RESIDENT))
    for _ in range(2):
        assert answers(engine) == expected()
    assert "eager decode" in engine.status()[0]


def test_weights_are_saved_and_adapters_learn_what_they_are_for(
    engine_of: Callable[..., Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    engine = engine_of(WAYS["beside resident ones"], "")
    engine.model.save_pretrained(tmp_path)
    saved = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    files = folder_of("qwen3-moe").glob("*.safetensors")
    right = {k: v for file in files for k, v in load_file(file).items()}
    assert saved.keys() == right.keys()
    assert all(torch.equal(saved[name], right[name]) for name in right)


def test_an_adapter_on_attention(engine_of: Callable[..., Any], expected: Callable[..., list[str]]) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for way in (layers(RESIDENT), WAYS["beside resident ones"]):
        engine = engine_of(way)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        engine.model.add_adapter(config)
        devices = {str(p.device) for n, p in engine.model.named_parameters() if "lora" in n}
        assert devices == {DEVICE}
        found.append(answers(engine))
    assert found[0] == found[1] != expected()


@pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")
@pytest.mark.parametrize("way", ["all", "beside resident ones"])
def test_memory_that_runs_out_is_mended(
    way: str, engine_of: Callable[..., Any], expected: Callable[..., list[str]]
) -> None:
    """The CPU takes whole layers over, with their keys and values."""
    from tests.simulated_cuda import fail_allocation_in

    engine = engine_of(WAYS[way])
    fail_allocation_in(_MANY)
    assert answers(engine) == expected()
    count = _MANY - fail_allocation_in(-1)
    engine.close()
    mended = 0
    for nth in range(0, count, count // 6):
        engine = engine_of(WAYS[way])
        fail_allocation_in(nth)
        found = [ask(engine, asked) for asked in ASKED]
        fail_allocation_in(-1)
        assert [answer.text for answer in found] == expected()[:2], nth
        mended += any(answer.finish.notes for answer in found)
        assert answers(engine) == expected(), nth
        engine.close()
    assert mended


def test_experts_that_come_for_prompts_leave_room_for_long_ones(engine_of: Callable[..., Any]) -> None:
    """Those that come for every token have what is spare, and no prompt counts on it."""
    split = engine_of(layers(VISITING_SPLIT))
    use = split.plan.use(DEVICE)
    assert split._placed._attachments._expert_lanes[DEVICE].device_bytes <= use.slots
    assert split._placed.beyond_plan() == {DEVICE: 0}
    few = engine_of(
        layers(VISITING_SPLIT), "quanto-int8", "mixtral"
    )  # four experts, of which two have to be there
    assert few._placed.beyond_plan() == {DEVICE: 0}
    streamed = engine_of(layers(STREAMED))
    held = streamed.memory()[DEVICE]["slots"]
    assert streamed._placed.beyond_plan() == {DEVICE: held - streamed.plan.use(DEVICE).slots}
    assert streamed._placed.beyond_plan()[DEVICE] > 0
