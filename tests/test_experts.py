"""Only routed experts move, and the answer is the one of the resident model, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm_magic.backends.accelerate.experts.stacks import Stack, can_route, find_stacks
from llm_magic.backends.accelerate.files.extents import Extent, file_extents
from llm_magic.backends.accelerate.files.reader import FileReader, page_buffer
from llm_magic.backends.accelerate.placement.blocks import BlockTensors, FileStore, RamStore, write_block
from llm_magic.backends.accelerate.placement.expert_cache import ExpertCache, ExpertLayer
from llm_magic.backends.accelerate.placement.expert_lanes import DeviceExperts, ExpertTraveller
from llm_magic.backends.accelerate.placement.expert_stores import (
    ExpertStore,
    FileExperts,
    RamExperts,
    expert_images,
)
from llm_magic.backends.accelerate.placement.routed_experts import RoutedExperts, advise_routed
from llm_magic.backends.accelerate.placement.stream import DONE, HostStreams, Staging
from llm_magic.units import MIB
from tests.caches import cache_of, given
from tests.fake_streams import FakeStreams

LAYERS = 3
EXPERTS = 6
WIDTHS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "dtype": "float32",
}


# --- Models


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDTHS, **own))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    own = {"intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**WIDTHS, **own))


def _olmoe() -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    own = {"intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 3}
    return OlmoeForCausalLM(OlmoeConfig(**WIDTHS, **own))


def _gpt_oss() -> Any:
    """Transposed stacks, with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    own = {"head_dim": 8, "intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**WIDTHS, **own))


def _deepseek_v3() -> Any:
    """A dense first layer and a shared expert beside the routed ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    own = {"intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": EXPERTS, "n_group": 2}
    own |= {"topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    own |= {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**WIDTHS | own))


def _granite() -> Any:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    own = {"intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**WIDTHS, **own))


ROUTED = {
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "gpt-oss": _gpt_oss,
    "deepseek-v3": _deepseek_v3,
    "granite-moe": _granite,
}


def _llama4() -> Any:
    """All experts in one product."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    own = {"head_dim": 8, "intermediate_size": 16, "intermediate_size_mlp": 32, "num_local_experts": EXPERTS}
    return Llama4ForCausalLM(Llama4TextConfig(**WIDTHS, **own, interleave_moe_layer_step=1))


def _dbrx() -> Any:
    """All experts in one matrix."""
    from transformers import DbrxConfig, DbrxForCausalLM

    ffn = {"ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2}
    widths = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
    return DbrxForCausalLM(DbrxConfig(**widths, ffn_config=ffn, attn_config=attention))


def _jetmoe() -> Any:
    """Goes through all experts, whatever the router says."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    widths = {name: WIDTHS[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    own = {"num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 16, "num_local_experts": EXPERTS}
    return JetMoeForCausalLM(JetMoeConfig(**widths, **own, num_experts_per_tok=2))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**WIDTHS, intermediate_size=64))


def _mamba() -> Any:
    """The convolution's weight has three dimensions too."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2))


WHOLE = {"llama4": _llama4, "dbrx": _dbrx, "jetmoe": _jetmoe, "llama": _llama, "mamba": _mamba}


def _built(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return make().eval().requires_grad_(False)


# --- Streams that are late, stores that fail


class LateStreams(HostStreams):
    """Copies end on another thread, some time later; until then a slot holds NaN."""

    def __init__(self, seed: int = 0) -> None:
        self._delays = random.Random(seed)
        self._thread = ThreadPoolExecutor(2)

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Any:
        for _, target in pairs:
            target.fill_(float("nan") if target.is_floating_point() else 255)
        delay = self._delays.choice((0, 0.0005, 0.002))
        return LateCopy(self._thread.submit(self._carry, list(pairs), delay))

    def _carry(self, pairs: list[tuple[Any, Any]], delay: float) -> None:
        threading.Event().wait(delay)
        for source, target in pairs:
            target.copy_(source)


@dataclass
class LateCopy:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()

    def settle(self) -> None:
        self.future.exception()

    def synchronize(self) -> None:
        self.future.result()


class Broken(Exception):
    """What a scripted fault raises."""


class Interrupted(BaseException):
    """As an interrupt: no error that anything recovers from."""


@dataclass
class Faults:
    """Raise at one fetch, when it starts or when its bytes are waited for."""

    at: int = 0
    stage: str = "start"
    fetches: int = 0

    def source(self, inner: Any) -> Any:
        return FaultySource(inner, self)


@dataclass
class FaultySource:
    inner: Any
    faults: Faults

    def start(self, slot: Any, after: Any) -> Any:
        self.faults.fetches += 1
        if self.faults.fetches != self.faults.at:
            return self.inner.start(slot, after)
        if self.faults.stage == "start":
            raise Broken
        slot.fill_(255)
        failed: Future[None] = Future()
        failed.set_exception(Broken())
        return LateCopy(failed)


@dataclass
class Recorded:
    """A store that writes down what is fetched, and fails where it is told to."""

    inner: ExpertStore
    faults: Faults = field(default_factory=Faults)
    fetched: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def source(self, index: int) -> Any:
        self.fetched.append(index)
        return self.faults.source(self.inner.source(index))


# --- Routing a whole model


@dataclass
class Routed:
    """A model whose experts are all behind stores."""

    model: Any
    cache: ExpertCache
    layers: list[RoutedExperts]
    stores: list[Recorded]
    close: Callable[[], None] = lambda: None

    @property
    def expert_bytes(self) -> int:
        return self.stores[0].expert_bytes


Stored = Callable[[tuple[Stack, ...], list[Any], str], ExpertStore]


def _route(
    model: Any, store: Stored, slots: int, streams: Any = None, faults: Faults | None = None
) -> Routed:
    faults = faults or Faults()
    stores, modules = [], []
    for name, block in _blocks(model):
        stacks = find_stacks(block)
        if not stacks:
            continue
        module = block.get_submodule(stacks[0].module_name)
        tensors = [module._parameters[stack.parameter_name].data for stack in stacks]
        stores.append(Recorded(store(stacks, tensors, name), faults))
        modules.append(module)
        for stack in stacks:
            meta = torch.empty(stack.shape, dtype=stack.dtype, device="meta")
            module._parameters[stack.parameter_name] = torch.nn.Parameter(meta, requires_grad=False)
    size = max(one.slot_bytes for one in stores)
    cache = ExpertCache(page_buffer(slots * size)[: slots * size], size, streams or HostStreams())
    pairs = zip(modules, stores, strict=True)
    return Routed(model, cache, [RoutedExperts(module, one, cache) for module, one in pairs], stores)


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    return ((f"layers.{number}", layer) for number, layer in enumerate(_layers(model)))


def _layers(model: Any) -> Any:
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model.backbone
    return getattr(inner, "layers", None) or inner.blocks


def _in_ram(streams: Any) -> Stored:
    return lambda stacks, tensors, _name: RamExperts(stacks, tensors, streams)


def _in_files(folder: Path, make: Callable[..., ExpertStore]) -> Stored:
    def store(stacks: tuple[Stack, ...], tensors: list[Any], name: str) -> ExpertStore:
        path = folder / f"{name}.safetensors"
        save_file({s.parameter_name: t.contiguous() for s, t in zip(stacks, tensors, strict=True)}, path)
        return make(stacks, expert_images(stacks, _extents(path, stacks)))

    return store


def _extents(path: Path, stacks: Sequence[Stack]) -> list[Extent]:
    found = file_extents(path)
    return [found[stack.parameter_name].extent for stack in stacks]


PROMPT = torch.tensor([[5, 17, 80, 33, 2, 61, 44, 9, 70, 28, 12, 95]])


def _logits(model: Any, tokens: int = 6) -> torch.Tensor:
    """Of the prompt and of some greedy tokens after it [prompt + tokens, vocabulary]."""
    with torch.no_grad():
        answer = model(PROMPT, use_cache=True)
        rows = [answer.logits[0]]
        for _ in range(tokens):
            token = rows[-1][-1].argmax().view(1, 1)
            answer = model(token, **given(cache_of(answer)), use_cache=True)
            rows.append(answer.logits[0])
    return torch.cat(rows)


def _expected(make: Callable[[], Any], tokens: int = 6) -> torch.Tensor:
    """By the resident model, with the same implementation."""
    model = _built(make)
    model.set_experts_implementation("eager")
    logits = _logits(model, tokens)
    assert logits.isfinite().all()
    return logits


# --- Which models


@pytest.mark.parametrize("name", ROUTED)
def test_models_that_take_one_expert_at_a_time_are_routed(name: str) -> None:
    blocks = [block for _, block in _blocks(_built(ROUTED[name]))]
    dense = 1 if name == "deepseek-v3" else 0
    assert [bool(find_stacks(block)) for block in blocks] == [False] * dense + [True] * (LAYERS - dense)


@pytest.mark.parametrize("name", WHOLE)
def test_other_models_move_whole(name: str) -> None:
    for _, block in _blocks(_built(WHOLE[name])):
        assert find_stacks(block) == ()


def test_a_model_with_experts_that_do_nothing_is_routed() -> None:
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    with torch.device("meta"):
        experts = LongcatFlashExperts(LongcatFlashConfig(n_routed_experts=4, zero_expert_num=2))
    assert can_route(experts)
    assert [stack.experts for stack in find_stacks(experts)] == [6, 4]


def test_experts_are_judged_by_what_they_do() -> None:
    model = _built(_mixtral)
    experts = model.model.layers[0].mlp.experts
    asked_in_turn = type(experts)

    class WholeStack(asked_in_turn):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            self.down_proj.sum()
            return super().forward(hidden, index, weights)

    class TwoAtOnce(asked_in_turn):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            both = [self.gate_up_proj[expert] for expert in index.unique()]
            return super().forward(hidden, index, weights) + 0 * both[0].sum()

    class ForAll(asked_in_turn):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            return hidden + sum(self.gate_up_proj[i].sum() for i in range(EXPERTS))

    assert can_route(experts)
    for other in (WholeStack, TwoAtOnce, ForAll):
        experts.__class__ = other
        assert not can_route(experts)


def test_experts_that_no_tensor_tells_of_in_turn_move_whole() -> None:
    """Each stack is asked with a tensor of its own: which one comes next cannot be known without reading it."""
    model = _built(_mixtral)
    experts = model.model.layers[0].mlp.experts

    class Anew(type(experts)):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            return sum(
                s[i.clone()].sum() for i in index.unique() for s in (self.gate_up_proj, self.down_proj)
            )

    experts.__class__ = Anew
    assert not can_route(experts)


@pytest.mark.parametrize("asked", [[0], [0, 2, 5]])
def test_a_pass_that_does_not_ask_for_what_tokens_are_routed_to_is_an_error(asked: list[int]) -> None:
    """Rather than another expert's weights."""
    routed = _route(_built(_mixtral), _in_ram(HostStreams()), 2)
    experts = routed.model.model.layers[0].mlp.experts

    class Other(type(experts)):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            return [self.gate_up_proj[torch.tensor(expert)] for expert in asked]

    layer = routed.layers[0]
    layer._twin.__class__ = Other
    for _ in range(2):
        with pytest.raises(RuntimeError, match="routed to"):
            layer.forward(torch.zeros(1, 32), torch.tensor([[0, 2]]), torch.ones(1, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_no_tensor_is_read_to_know_which_expert_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would come to a halt for it, once for each expert of a token."""
    streams = HostStreams()
    routed = _route(_built(ROUTED[name]), _in_ram(streams), 3, streams)
    expected = _expected(ROUTED[name])

    def read(_tensor: Any) -> int:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    assert torch.equal(_logits(routed.model), expected)


def test_passes_on_two_threads_ask_for_their_own() -> None:
    streams = LateStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), EXPERTS * LAYERS, streams)
    expected = _expected(_qwen3_moe)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(_logits, routed.model) for _ in range(4)]
        assert all(torch.equal(answer.result(), expected) for answer in answers)


def test_stacks_say_what_they_are() -> None:
    first, second = find_stacks(_built(_qwen3_moe).model.layers[1])
    # gate and up: 2 * 16 rows of 32 values of 4 bytes
    assert first == Stack(
        "mlp.experts", "gate_up_proj", EXPERTS, 2 * 16 * 32 * 4, torch.float32, (EXPERTS, 32, 32)
    )
    assert second == Stack("mlp.experts", "down_proj", EXPERTS, 32 * 16 * 4, torch.float32, (EXPERTS, 32, 16))
    assert second.name == "mlp.experts.down_proj"


def test_looking_leaves_the_model_as_it_was() -> None:
    model = _built(_qwen3_moe)
    before = _logits(model)
    for _, block in _blocks(model):
        find_stacks(block)
    assert torch.equal(_logits(model), before)
    assert model.config._experts_implementation == "grouped_mm"


# --- The same answer


@pytest.mark.parametrize("slots", [1, 2, 3, 7, EXPERTS * LAYERS])
@pytest.mark.parametrize("name", ROUTED)
def test_the_answer_is_that_of_the_resident_model(name: str, slots: int) -> None:
    streams = LateStreams(slots)
    routed = _route(_built(ROUTED[name]), _in_ram(streams), slots, streams)
    assert torch.equal(_logits(routed.model), _expected(ROUTED[name]))


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("direct", [False, True])
def test_from_files_straight_into_slots(tmp_path: Path, name: str, slots: int, direct: bool) -> None:
    reader = FileReader(direct=direct)
    store = _in_files(tmp_path, lambda stacks, images: FileExperts(stacks, images, reader))
    routed = _route(_built(ROUTED[name]), store, slots)
    try:
        assert torch.equal(_logits(routed.model), _expected(ROUTED[name]))
    finally:
        reader.close()


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("buffers", [1, 2])
def test_from_files_through_a_staging_ring(tmp_path: Path, name: str, buffers: int) -> None:
    streams, reader = LateStreams(), FileReader(direct=False)
    staging = Staging([page_buffer(1 << 17) for _ in range(buffers)])
    store = _in_files(tmp_path, lambda stacks, images: FileExperts(stacks, images, reader, staging, streams))
    routed = _route(_built(ROUTED[name]), store, 4, streams)
    try:
        assert torch.equal(_logits(routed.model), _expected(ROUTED[name]))
    finally:
        reader.close()


def test_from_memory_that_is_not_pinned_through_a_staging_ring() -> None:
    streams = LateStreams()
    staging = Staging([page_buffer(1 << 14) for _ in range(2)])
    with ThreadPoolExecutor(1) as executor:
        store: Stored = lambda stacks, tensors, _: RamExperts(stacks, tensors, streams, staging, executor)  # noqa: E731
        routed = _route(_built(_gpt_oss), store, 3, streams)
        assert torch.equal(_logits(routed.model), _expected(_gpt_oss))


def test_generate_gives_the_same_tokens(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = str(tiny_model("qwen3-moe"))
    resident = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    streams = LateStreams()
    routed = _route(AutoModelForCausalLM.from_pretrained(folder).eval(), _in_ram(streams), 3, streams)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2}
    expected = resident.generate(PROMPT, **settings)
    assert torch.equal(routed.model.generate(PROMPT, **settings), expected)
    batch = PROMPT.repeat(3, 1)
    batch[1:] += torch.tensor([[7], [30]])
    assert torch.equal(routed.model.generate(batch, **settings), resident.generate(batch, **settings))


def test_experts_whose_forward_is_called_by_itself_come_too() -> None:
    streams = LateStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), 2, streams)
    call = torch.randn(3, 32), torch.tensor([[0, 5], [5, 2], [1, 0]]), torch.rand(3, 2)
    resident = _built(_qwen3_moe)
    resident.set_experts_implementation("eager")
    for one, other in zip(_layers(routed.model), _layers(resident), strict=True):
        with torch.no_grad():
            assert torch.equal(one.mlp.experts.forward(*call), other.mlp.experts(*call))


def test_an_id_beyond_the_last_expert_means_none() -> None:
    streams = LateStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), 2, streams)
    call = torch.randn(2, 32), torch.tensor([[0, EXPERTS], [EXPERTS, 2]]), torch.rand(2, 2)
    resident = _built(_qwen3_moe)
    resident.set_experts_implementation("eager")
    with torch.no_grad():
        try:
            expected = resident.model.layers[0].mlp.experts(*call)
        except RuntimeError:  # transformers 5.17 knows no such ids
            with pytest.raises(RuntimeError):
                routed.model.model.layers[0].mlp.experts(*call)
            return
        assert torch.equal(routed.model.model.layers[0].mlp.experts(*call), expected)
    assert routed.stores[0].fetched == [0, 2]


def test_other_libraries_find_the_parameters() -> None:
    streams = HostStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), 4, streams)
    _logits(routed.model)
    stack = routed.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert stack.is_meta
    assert stack.shape == (EXPERTS, 32, 32)
    # no other layer computes in another way than before
    assert routed.model.model.layers[0].mlp.experts.config is routed.model.config
    assert routed.model.config._experts_implementation == "grouped_mm"


# --- Only what is routed to


def test_one_token_fetches_its_experts_and_no_others() -> None:
    streams = HostStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), EXPERTS * LAYERS, streams)
    chosen: list[set[int]] = []
    for layer in routed.model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda *call: chosen.append(set(call[-1][-1].flatten().tolist()))
        )
    with torch.no_grad():
        routed.model(PROMPT[:, :1])
    assert [set(store.fetched) for store in routed.stores] == chosen
    assert all(len(store.fetched) == 2 for store in routed.stores)  # two experts a token, each once
    assert (routed.cache.misses, routed.cache.hits) == (2 * LAYERS, 0)
    # an expert: 2 * 16 * 32 and 32 * 16 values of 4 bytes
    assert routed.cache.fetched_bytes == 2 * LAYERS * 1536 * 4


def test_experts_that_are_there_are_not_fetched_again() -> None:
    streams = HostStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), EXPERTS * LAYERS, streams)
    first = _logits(routed.model)
    fetched = routed.cache.fetched_bytes
    assert fetched <= EXPERTS * LAYERS * routed.expert_bytes
    assert torch.equal(_logits(routed.model), first)
    assert routed.cache.fetched_bytes == fetched


def test_all_missing_experts_start_before_the_first_is_used() -> None:
    started: list[int] = []
    store = _Counting(started)
    cache = ExpertCache(torch.zeros(4 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(store)
    cache.begin(layer, {6: 1, 1: 1, 3: 2}, 2)
    assert started == [1, 3, 6]
    assert [cache.take(index)[0][0].item() for index in (1, 3, 6)] == [1, 3, 6]
    cache.end()


def test_a_long_prompt_goes_through_the_slots_in_order() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    cache.begin(layer, dict.fromkeys(range(8), 1), 8)
    assert started == [0, 1]
    for index in range(8):
        assert cache.take(index)[0][0].item() == index
        assert started == list(range(min(index + 2, 8)))
    cache.end()
    assert cache.slots == 2


def test_what_a_pass_needs_last_gives_way_to_what_it_needs_now() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    _pass(cache, layer, 5, 1)
    _pass(cache, layer, 6, 1)
    cache.begin(layer, dict.fromkeys((1, 2, 5, 6), 1), 1)
    assert (cache.hits, started) == (2, [5, 6])
    after = {1: [5, 6, 1], 2: [5, 6, 1, 2], 5: [5, 6, 1, 2, 6], 6: [5, 6, 1, 2, 6]}
    for index, so_far in after.items():
        assert cache.take(index)[0][0].item() == index
        assert started == so_far
    cache.end()


def test_hot_experts_stay() -> None:
    """Two slots are for what comes and goes; the experts that most tokens use keep the others."""
    started: list[int] = []
    cache = ExpertCache(torch.zeros(4 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    for number in range(60):
        wanted = sorted({0, 1, 2 + number % 6})
        cache.begin(layer, dict.fromkeys(wanted, 1), 1)
        for index in wanted:
            cache.take(index)
        cache.end()
    assert started.count(0) == started.count(1) == 1


def test_heat_fades_so_that_the_set_follows_the_topic() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    for expert, tokens in ((0, 400), (1, 400), (2, 1)):
        _pass(cache, layer, expert, tokens)
    assert started == [0, 1, 2]
    _pass(cache, layer, 1, 1)  # was used as often as 0, but later: 0 had to go
    assert started == [0, 1, 2]
    for _ in range(350):  # less often than 1 was used, but that is one to two half-lives ago by now
        _pass(cache, layer, 2, 1)
    _pass(cache, layer, 3, 1)
    _pass(cache, layer, 2, 1)
    assert started == [0, 1, 2, 3]


def test_every_token_counts() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    cache.begin(layer, {0: 50, 1: 1}, 51)
    cache.take(0)
    cache.take(1)
    cache.end()
    _pass(cache, layer, 2, 1)
    _pass(cache, layer, 0, 1)
    assert started == [0, 1, 2]


def _pass(cache: ExpertCache, layer: ExpertLayer, expert: int, tokens: int) -> None:
    cache.begin(layer, {expert: tokens}, tokens)
    cache.take(expert)
    cache.end()


def test_layers_share_the_slots() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    one, two = ExpertLayer(_Counting(started)), ExpertLayer(_Counting(started, 100))
    for _ in range(3):
        for layer, value in ((one, 4), (two, 104)):
            cache.begin(layer, {4: 1}, 1)
            assert cache.take(4)[0][0].item() == value
            cache.end()
    assert len(started) == 2


def _long_pass(
    cache: ExpertCache, layer: ExpertLayer, value: int, following: ExpertLayer | None = None
) -> None:
    """Of 64 tokens, with all eight experts."""
    cache.begin(layer, dict.fromkeys(range(8), 8), 64, following)
    for index in range(8):
        assert cache.take(index)[0][0].item() == value + index
    cache.end()


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 16])
def test_after_nearly_all_experts_of_a_layer_those_of_the_next_one_come(slots: int) -> None:
    """Behind those that this pass still waits for, and as far as slots are free."""
    started: list[int] = []
    cache = ExpertCache(torch.zeros(slots * 8, dtype=torch.uint8), 8, HostStreams())
    one, two = ExpertLayer(_Counting(started)), ExpertLayer(_Counting(started, 100))
    _long_pass(cache, one, 0, two)
    ahead = min(
        8, slots - 1
    )  # the last expert of the first layer is at work as long as nobody says otherwise
    assert started == [*range(8), *range(ahead)]
    _long_pass(cache, two, 100)
    assert started == [*range(8), *range(8)]  # each once
    assert (cache.hits, cache.misses) == (0, 16)  # those were on their way


def test_few_experts_of_a_layer_tell_nothing_of_the_next_one() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(16 * 8, dtype=torch.uint8), 8, HostStreams())
    one, two = ExpertLayer(_Counting(started)), ExpertLayer(_Counting(started, 100))
    cache.begin(one, dict.fromkeys(range(7), 1), 7, two)
    for index in range(7):
        cache.take(index)
    cache.end()
    assert started == list(range(7))


def test_what_was_expected_in_vain_makes_room() -> None:
    """For another layer, and beside a pass on another thread."""
    started: list[int] = []
    cache = ExpertCache(torch.zeros(4 * 8, dtype=torch.uint8), 8, HostStreams())
    one, two, three = (ExpertLayer(_Counting(started, 100 * n)) for n in range(3))
    _long_pass(cache, one, 0, two)
    for _ in range(3):
        _long_pass(cache, three, 200)
    _long_pass(cache, one, 0, two)
    cache.settle()
    _long_pass(cache, three, 200)
    with ThreadPoolExecutor(1) as other:
        other.submit(cache.begin, three, {0: 1, 1: 1, 5: 1}, 1).result()
        _long_pass(cache, one, 0, two)
        assert [other.submit(cache.take, index).result()[0][0].item() for index in (0, 1, 5)] == [
            200,
            201,
            205,
        ]
        other.submit(cache.end).result()
    _long_pass(cache, two, 100)


def test_a_transfer_ahead_that_fails_is_tried_again_when_it_is_needed() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(4 * 8, dtype=torch.uint8), 8, HostStreams())
    one, two = ExpertLayer(_Counting(started)), ExpertLayer(_Counting(started, 100))
    source, left = two.store.source, [3]

    def fail(index: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the disk is gone")
        return source(index)

    two.store.source = fail  # type: ignore[method-assign]
    _long_pass(cache, one, 0, two)
    _long_pass(cache, two, 100)


def test_a_cache_without_room_for_one_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        ExpertCache(torch.zeros(7, dtype=torch.uint8), 8, HostStreams())
    cache = ExpertCache(torch.zeros(8, dtype=torch.uint8), 8, HostStreams())
    model = _built(_qwen3_moe)
    experts = model.model.layers[0].mlp.experts
    store = RamExperts(find_stacks(experts), list(experts.parameters()), HostStreams())
    with pytest.raises(ValueError, match="a slot has 8"):
        RoutedExperts(experts, store, cache)


class _Counting:
    """Eight experts of eight bytes, each filled with its number."""

    experts = 8
    expert_bytes = slot_bytes = 8

    def __init__(self, started: list[int], base: int = 0) -> None:
        self._started, self._base = started, base

    def source(self, index: int) -> Any:
        return _Filling(index, self._base, self._started)

    def views(self, index: int, slot: Any) -> tuple[Any, ...]:
        return (slot,)


@dataclass
class _Filling:
    index: int
    base: int
    started: list[int]

    def start(self, slot: Any, after: Any) -> Any:
        self.started.append(self.index)
        slot.fill_(self.base + self.index)
        return DONE


# --- Faults


def _fetches_of_a_run(slots: int) -> int:
    faults, streams = Faults(), LateStreams()
    routed = _route(_built(_qwen3_moe), _in_ram(streams), slots, streams, faults)
    _logits(routed.model, 2)
    return faults.fetches


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("stage", ["start", "arrival"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_after_a_fault_at_any_fetch_the_next_answer_is_right(slots: int, stage: str, settle: bool) -> None:
    expected = _expected(_qwen3_moe, 2)
    for at in range(1, _fetches_of_a_run(slots) + 1, 1 if slots == 8 else 3):
        streams, faults = LateStreams(at), Faults(at, stage)
        routed = _route(_built(_qwen3_moe), _in_ram(streams), slots, streams, faults)
        with pytest.raises(Broken):
            _logits(routed.model, 2)
        if settle:
            routed.cache.settle()
        assert torch.equal(_logits(routed.model, 2), expected)


@pytest.mark.parametrize("error", [Broken, Interrupted])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_after_a_fault_of_the_model_the_next_answer_is_right(slots: int, error: type[BaseException]) -> None:
    """Raised at each expert that computes, with others on their way; again and again on one model."""
    streams = LateStreams(slots)
    routed = _route(_built(_qwen3_moe), _in_ram(streams), slots, streams)
    activation = routed.model.model.layers[1].mlp.experts.act_fn
    for failing in range(EXPERTS):
        calls = iter(range(100))

        def fail(_module: Any, _inputs: Any, failing: int = failing, calls: Iterator[int] = calls) -> None:
            if next(calls) == failing:
                raise error

        handle = activation.register_forward_pre_hook(fail)
        with pytest.raises(error):
            _logits(routed.model, 2)
        handle.remove()
    assert torch.equal(_logits(routed.model, 2), _expected(_qwen3_moe, 2))


def test_settle_forgets_what_nobody_saw_arrive() -> None:
    """A transfer that failed while nobody waited for it must not fail the next answer."""
    started: list[int] = []
    store = Recorded(_Counting(started), Faults(2, "arrival"))
    cache = ExpertCache(torch.zeros(4 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(store)
    cache.begin(layer, {1: 1, 2: 1}, 1)
    assert cache.take(1)[0][0].item() == 1
    cache.settle()
    cache.begin(layer, {1: 1, 2: 1}, 1)
    assert [cache.take(index)[0][0].item() for index in (1, 2)] == [1, 2]
    cache.end()
    assert store.fetched == [1, 2, 2]


def test_a_pass_that_never_ended_gives_its_slots_to_the_next_one() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    layer = ExpertLayer(_Counting(started))
    for first in (0, 2, 4):
        cache.begin(layer, {first: 1, first + 1: 1}, 1)
        assert cache.take(first)[0][0].item() == first
    assert started == [0, 1, 2, 3, 4, 5]


def test_a_file_that_changed_is_an_error_and_not_an_answer(tmp_path: Path) -> None:
    from llm_magic.errors import EngineError

    reader = FileReader(direct=False)
    store = _in_files(tmp_path, lambda stacks, images: FileExperts(stacks, images, reader))
    routed = _route(_built(_qwen3_moe), store, 2)
    whole = (tmp_path / "layers.1.safetensors").read_bytes()
    (tmp_path / "layers.1.safetensors").write_bytes(whole[:4096])
    with pytest.raises(EngineError):
        _logits(routed.model)
    reader.close()


# --- Threads


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_threads_share_the_slots(slots: int) -> None:
    expected = _expected(_qwen3_moe)
    streams = LateStreams(slots)
    routed = _route(_built(_qwen3_moe), _in_ram(streams), slots, streams)
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(_logits, routed.model) for _ in range(6)]
        for answer in answers:
            assert torch.equal(answer.result(timeout=60), expected)


def test_two_models_in_turn() -> None:
    streams = LateStreams()
    one = _route(_built(_qwen3_moe), _in_ram(streams), 3, streams)
    two = _route(_built(_mixtral), _in_ram(streams), 3, streams)
    for _ in range(2):
        assert torch.equal(_logits(one.model), _expected(_qwen3_moe))
        assert torch.equal(_logits(two.model), _expected(_mixtral))


# --- Leaving, saving, mapped files


def test_detaching_leaves_the_module_as_it_was() -> None:
    streams = HostStreams()
    model = _built(_qwen3_moe)
    before = _logits(model)
    experts = [layer.mlp.experts for layer in model.model.layers]
    tensors = [dict(module.named_parameters()) for module in experts]
    routed = _route(model, _in_ram(streams), 4, streams)
    assert all(parameter.is_meta for module in experts for parameter in module.parameters())
    for layer in routed.layers:
        layer.detach()
        layer.detach()
    for module, values in zip(experts, tensors, strict=True):
        assert module.down_proj.is_meta
        assert "forward" not in module.__dict__
        for name, value in values.items():
            module._parameters[name] = value
    assert torch.equal(_logits(model), before)


def test_slots_of_a_detached_layer_go_first() -> None:
    started: list[int] = []
    cache = ExpertCache(torch.zeros(2 * 8, dtype=torch.uint8), 8, HostStreams())
    one, two = ExpertLayer(_Counting(started)), ExpertLayer(_Counting(started))
    _pass(cache, two, 5, 1)
    _pass(cache, one, 1, 900)
    cache.forget(one)
    _pass(cache, two, 6, 1)
    _pass(cache, two, 5, 1)
    assert started == [5, 1, 6]


def test_mapped_experts_are_read_only_where_tokens_go(tmp_path: Path) -> None:
    """On a CPU alone with mapped files nothing needs to be fetched: other experts' pages stay untouched."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=512, num_experts=64, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    expert_bytes = 512 * 256 * 4  # of the down projection: 512 KiB, and 32 MiB of all
    path = tmp_path / "experts.bin"
    torch.randn(64, 256, 512).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=True, size=64 * 256 * 512)
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(64, 1024, 256), requires_grad=False)
    experts.down_proj = torch.nn.Parameter(mapped.view(64, 256, 512), requires_grad=False)
    with torch.no_grad():
        experts(torch.randn(1, 256), torch.tensor([[44, 4]]), torch.ones(1, 2))
    # the system maps up to 2 MiB around what was touched, at either end
    assert 2 * expert_bytes <= _resident_bytes(path) <= 2 * (expert_bytes + 2 * 2 * MIB)


def _resident_bytes(path: Path) -> int:
    """Of a mapped file, what this process has touched."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        pytest.skip("the system does not say which pages were touched")
    start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) * 1024 for line in lines[start:] if line.startswith("Rss:"))


def test_the_system_is_asked_for_the_routed_experts_of_mapped_files(tmp_path: Path) -> None:
    model = _built(_qwen3_moe)
    experts = model.model.layers[0].mlp.experts
    stacks = find_stacks(experts)
    extents = [Extent(tmp_path / "a", 100, 0), Extent(tmp_path / "b", 0, 0)]
    asked: list[list[Extent]] = []
    handle = advise_routed(experts, stacks, extents, asked.append)
    with torch.no_grad():
        experts(torch.randn(2, 32), torch.tensor([[3, 0], [3, 3]]), torch.ones(2, 2))
    handle.remove()
    with torch.no_grad():
        experts(torch.randn(1, 32), torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert asked == [
        [
            Extent(tmp_path / "a", 100, 4096),
            Extent(tmp_path / "b", 0, 2048),
            Extent(tmp_path / "a", 100 + 3 * 4096, 4096),
            Extent(tmp_path / "b", 3 * 2048, 2048),
        ]
    ]


# --- The experts of a device


def _parted(block: Any) -> tuple[BlockTensors, BlockTensors]:
    """A block's experts, and all else of it."""
    stacks = {stack.name for stack in find_stacks(block)}
    others = {name for name, _ in block.named_parameters()} - stacks
    return BlockTensors(block, without=others), BlockTensors(block, without=stacks)


def _travellers(model: Any, folder: Path | None, reader: FileReader) -> list[ExpertTraveller]:
    found: list[ExpertTraveller] = []
    for name, block in _blocks(model):
        experts, _ = _parted(block)
        values = experts.current()
        if folder is None:
            memory = page_buffer(experts.bytes)[: experts.bytes]
            for view, value in zip(experts.views(memory), values, strict=True):
                view.copy_(value)
            found.append((experts, RamStore(experts, memory), None))
        else:
            written = write_block(experts, values, folder / name)
            found.append((experts, FileStore(experts, written, reader), None))
        experts.clear()
    return found


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(("device", "on_disk"), [("cpu", True), ("cpu:0", True), ("cpu:0", False)])
def test_the_experts_of_a_device(tmp_path: Path, name: str, device: str, on_disk: bool) -> None:
    """``cpu:0`` stands for a device with memory of its own, which everything has to be copied to."""
    reader, streams = FileReader(direct=False), LateStreams()
    model = _built(ROUTED[name])
    travellers = _travellers(model, tmp_path if on_disk else None, reader)
    experts = DeviceExperts(device, travellers, 0, reader, streams)
    assert experts.cache.slots == 2
    assert experts.device_bytes == 2 * experts.cache.slot_bytes
    assert bool(experts.staging_bytes) == (device != "cpu")
    assert torch.equal(_logits(model), _expected(ROUTED[name]))
    experts.settle()
    experts.close()
    experts.close()
    reader.close()


def test_the_budget_of_a_device_is_kept(tmp_path: Path) -> None:
    reader = FileReader(direct=False)
    model = _built(_qwen3_moe)
    travellers = _travellers(model, tmp_path, reader)
    small = DeviceExperts("cpu", travellers, 100_000, reader)
    slot_bytes, slots = small.cache.slot_bytes, small.cache.slots
    assert slots == 100_000 // slot_bytes
    assert small.device_bytes <= 100_000
    small.close()
    large = DeviceExperts("cpu", travellers, 1 << 30, reader)
    assert large.cache.slots == EXPERTS * LAYERS
    assert torch.equal(_logits(model), _expected(_qwen3_moe))
    large.close()
    reader.close()


def test_memory_that_somebody_computes_with_is_not_written_to_yet() -> None:
    """Room for slots may be what a tensor was given back from a moment ago, with kernels still behind it."""
    streams = FakeStreams(longest_delay_s=0)
    stacks = (Stack("", "down_proj", 2, 16, torch.float32, (2, 2, 2)),)
    store = RamExperts(stacks, [torch.ones(2, 2, 2)], streams)
    behind, fetched = threading.Event(), threading.Event()
    streams.compute.enqueue(lambda: behind.wait(60))
    cache = ExpertCache(torch.zeros(2 * store.slot_bytes, dtype=torch.uint8), store.slot_bytes, streams)
    cache.begin(ExpertLayer(store), {0: 1}, 1)
    streams.copies.enqueue(fetched.set)
    assert not fetched.wait(0.1)
    behind.set()
    assert fetched.wait(60)
    cache.close()
    streams.close()
