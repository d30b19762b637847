"""Joined projections, and layers that are compiled beside the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.decoding import capture
from llm_magic.backends.accelerate.decoding.capture import CapturedSteps
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS, JoinedProjections
from llm_magic.backends.accelerate.decoding.warmup import WarmUp, resident_layers, without_compilation_seen
from tests import tiny
from tests.engines import plan_for
from tests.test_capture import CONTEXT, Failing, Tapes, assert_close, begin, eager, greedy, prefilled, prompts


class Plain:
    """A recorder whose replay is the sweep itself: compiled code cannot be written down kernel by kernel."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        self.recorded += 1
        sweep()
        return sweep


class Compiler:
    """torch.compile with a backend that counts the programs that it gets and runs them as they are."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.programs = 0
        self._before = before

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(forward, dynamic=False, backend=self._backend)

    def _backend(self, program: Any, _inputs: Any) -> Any:
        self._before()
        self.programs += 1
        return program.forward


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    for thread in threading.enumerate():
        if thread.name == "llm_magic-compile":
            thread.join()


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Any]:
    """A model of the test's own: what is joined changes it."""
    from transformers import AutoModelForCausalLM

    def read(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
        folder = tmp_path / name
        if not folder.exists():
            tiny.MODELS[name](folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for parameter in model.parameters():  # weights of their own, as on a device
            parameter.data = parameter.data.clone()
        return model

    return read


def layers_of(model: Any) -> dict[int, Any]:
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    return dict(enumerate(blocks))


def step_of(model: Any, warm_up: WarmUp, recorder: Any = None) -> CapturedSteps:
    device = torch.device("cpu")
    return CapturedSteps(model, CONTEXT, recorder or Plain(), device, warm_up=warm_up)


def unique_bytes(model: Any) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


# --- Joined projections


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_projections_that_there_is_no_memory_for_are_left_alone(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    model, ids = fresh(), prompts()
    with torch.no_grad():
        wanted = model(ids).logits
    usual, count = torch.cat, 0

    def cat(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "cat", cat)
        joined = JoinedProjections(layers_of(model).values())
    assert len(joined) == failing - 1
    with torch.no_grad():
        assert_close(model(ids).logits, wanted)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", cat)
        joined.undo()
    assert not any("joined_group" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert_close(model(ids).logits, wanted)


@pytest.mark.parametrize("tokens", [1, 4, FEW_TOKENS, FEW_TOKENS + 1])
def test_joined_projections_give_the_same_logits(fresh: Any, tokens: int) -> None:
    model, ids = fresh(), prompts(2, tokens)
    with torch.no_grad():
        expected = model(ids).logits
        joined = JoinedProjections(model.model.layers)
        assert len(joined) == 2 * tiny.LAYERS
        logits = model(ids).logits
    assert_close(logits, expected)
    if tokens > FEW_TOKENS:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_projections_give_the_same_tokens(fresh: Any, dtype: torch.dtype) -> None:
    model, ids = fresh(dtype=dtype), prompts()
    expected = eager(model, ids, 16)
    JoinedProjections(model.model.layers)
    assert torch.equal(eager(model, ids, 16), expected)


def test_joining_counts_products(fresh: Any) -> None:
    """Seven matrices a layer become four."""
    model, counted = fresh(), []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func is torch.nn.functional.linear)
            return func(*args, **(kwargs or {}))

    def products() -> int:
        counted.clear()
        with torch.no_grad(), Count():
            model(prompts(1, 2))
        return sum(counted)

    assert products() == 7 * tiny.LAYERS + 1
    joined = JoinedProjections(model.model.layers)
    assert products() == 4 * tiny.LAYERS + 1
    joined.undo()
    assert products() == 7 * tiny.LAYERS + 1


def test_no_more_bytes_and_the_same_names(fresh: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, held = dict(model.named_parameters()), unique_bytes(model)
    joined = JoinedProjections(model.model.layers)
    assert unique_bytes(model) == held
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    joined.undo()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for state in (model.state_dict(), saved.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert unique_bytes(model) == held
    assert all("forward" not in vars(module) for module in model.modules())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(parameters)


def test_an_error_between_two_projections_leaves_nothing_wrong(fresh: Any) -> None:
    model, ids = fresh(), prompts(1, 3)
    JoinedProjections(model.model.layers)
    with torch.no_grad():
        expected = model(ids).logits
        attention = model.model.layers[1].self_attn
        attention.q_proj(torch.ones(1, 3, 64))
        assert torch.equal(
            attention.k_proj(torch.zeros(1, 3, 64)), torch.zeros(1, 3, attention.k_proj.out_features)
        )
        assert torch.equal(model(ids).logits, expected)


class Special(torch.nn.Linear):
    """As a packed or an adapted layer: not a plain one."""


def attention(**changes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, changes.get(name) or torch.nn.Linear(4, 4))
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {"k_proj": Special(4, 4)},
        {"k_proj": torch.nn.Linear(4, 4, bias=False)},
        {"k_proj": torch.nn.Linear(8, 4)},
        {"k_proj": torch.nn.Linear(4, 4, dtype=torch.float16)},
        {"k_proj": torch.nn.Linear(4, 4, device="meta")},
    ],
)
def test_what_differs_is_not_joined(changes: dict[str, Any]) -> None:
    assert len(JoinedProjections([attention(**changes)])) == 0


def test_what_is_held_elsewhere_is_not_joined() -> None:
    buffer = torch.zeros(64)
    module = attention()
    assert len(JoinedProjections([module])) == 1
    held, hooked = attention(), attention()
    held.k_proj.weight.data = buffer[:16].view(4, 4)
    hooked.v_proj.register_forward_pre_hook(lambda _module, _args: None)
    assert len(JoinedProjections([held, hooked, module])) == 0


def test_weights_of_one_buffer_are_joined_where_they_are() -> None:
    """As in a block's flat buffer: nothing is copied, and nothing is laid elsewhere afterwards."""
    buffer, module = torch.randn(64), attention(**{f"{name}_proj": torch.nn.Linear(4, 4) for name in "qkv"})
    projections = (module.q_proj, module.k_proj, module.v_proj)
    for place, projection in enumerate(projections):
        projection.weight.data = buffer[16 * place : 16 * (place + 1)].view(4, 4)
    addresses = [projection.weight.data_ptr() for projection in projections]
    states = torch.randn(1, 2, 4)
    with torch.no_grad():
        expected = [projection(states) for projection in projections]
        joined = JoinedProjections([module])
        assert module.q_proj.joined_group.weight.data_ptr() == buffer.data_ptr()
        for projection, before in zip(projections, expected, strict=True):
            torch.testing.assert_close(projection(states), before)
    joined.undo()
    assert [projection.weight.data_ptr() for projection in projections] == addresses


def test_biases_are_joined_too() -> None:
    module = attention(k_proj=torch.nn.Linear(4, 6))
    states = torch.randn(1, 2, 4)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    with torch.no_grad():
        expected = [projection(states) for projection in projections]
        assert len(JoinedProjections([module])) == 1
        for projection, before in zip(projections, expected, strict=True):
            torch.testing.assert_close(projection(states), before)


# --- Compiled layers


def test_only_layers_that_stay_on_a_gpu_are_changed(fresh: Any, tmp_path: Path) -> None:
    model = fresh()
    _, plan = plan_for(tmp_path / "llama")
    assert resident_layers(model, plan) == {}
    homes = {"layers.1": "cuda:0", "layers.2": "cpu", "layers.3": "cuda:0"}
    placed = [replace(p, home=homes.get(p.block.label, "cpu"), compute="cuda:0") for p in plan.placements]
    found = resident_layers(model, replace(plan, placements=tuple(placed)))
    assert found == {1: model.model.layers[1], 3: model.model.layers[3]}


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gpt2", 1), ("gemma", 2)])
def test_compiled_layers_take_over_between_two_answers(fresh: Any, name: str, kinds: int) -> None:
    model, compiler, recorder, ids = fresh(name), Compiler(), Plain(), prompts()
    expected = eager(model, ids, 12)
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up, recorder)
    assert torch.equal(greedy(step, model, ids, 12), expected)
    warm_up.wait()
    assert (step.status, warm_up.reason, compiler.programs) == ("captured decode", "", kinds)
    assert "compiled layers" in warm_up.status
    for _ in range(2):
        assert torch.equal(greedy(step, model, ids, 12), expected)
        assert step.status == "captured decode, compiled layers"
    # One program serves every layer of a kind, and nothing was compiled while an answer waited.
    assert (compiler.programs, recorder.recorded) == (kinds, 2)


def test_a_sweep_that_ended_between_two_kinds_of_layers_is_no_example(fresh: Any) -> None:
    model, compiler, ids, calls = fresh("gemma"), Compiler(), prompts(), []
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up)

    def interrupt(*_: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    cache = prefilled(model, ids)
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    begin(step, cache, None, 32)
    with pytest.raises(KeyboardInterrupt):
        step(ids[:, -1:], 8)
    handle.remove()
    expected = eager(model, ids, 12)
    for _ in range(2):
        assert torch.equal(greedy(step, model, ids, 12), expected)
        warm_up.wait()
    assert torch.equal(greedy(step, model, ids, 12), expected)
    assert (calls, compiler.programs, warm_up.reason) == ([1], 2, "")
    assert step.status == "captured decode, compiled layers"


def test_each_size_of_a_sweep_is_compiled_for_itself(fresh: Any) -> None:
    model, compiler, recorder, ids = fresh(), Compiler(), Plain(), prompts()
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up, recorder)
    seen = []
    for _ in range(2):
        begin(step, prefilled(model, ids), None, 32)
        seen.append((step(ids[:, -1:], 8), step(ids[:, :3], 9)))
        step.give_back(12)
        warm_up.wait()
    # The second size is captured at once only if the first one was compiled by then.
    assert compiler.programs == 2
    assert recorder.recorded in (3, 4)
    for before, after in zip(*seen, strict=True):
        assert_close(after, before)


def test_an_answer_does_not_wait_for_a_compilation(fresh: Any) -> None:
    """Here one never ends while the answers run."""
    release, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert release.wait(60)

    model, ids = fresh(), prompts()
    expected = eager(model, ids, 8)
    warm_up = WarmUp(layers_of(model), Compiler(hold))
    step = step_of(model, warm_up)
    greedy(step, model, ids, 8)
    assert entered.wait(60)
    assert "compiling layers in the background" in warm_up.status
    assert torch.equal(greedy(step, model, ids, 8), expected)
    assert step.status == "captured decode"
    release.set()
    warm_up.wait()
    assert torch.equal(greedy(step, model, ids, 8), expected)
    assert step.status == "captured decode, compiled layers"


def test_an_answer_that_grows_beside_a_compilation_stays_captured(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded before it sees all of the cache, which is masked where nothing is yet."""
    monkeypatch.setattr(capture, "_FIRST_VISIBLE", 16)
    release, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert release.wait(60)

    model, recorder, ids = fresh(), Plain(), prompts()
    expected = eager(model, ids, 40)
    warm_up = WarmUp(layers_of(model), Compiler(hold))
    step = step_of(model, warm_up, recorder)
    monkeypatch.setattr(step, "_sweep_once", lambda _shape: pytest.fail("a sweep was not captured"))
    try:
        begin(step, prefilled(model, ids), None, 64)
        step(ids[:, -1:], 8)
        assert not entered.is_set()  # as long as the answer runs
        step.give_back(9)
        assert entered.wait(60)
        assert recorder.recorded == 2
        assert torch.equal(greedy(step, model, ids, 40), expected)
        assert recorder.recorded == 2
    finally:
        release.set()
    warm_up.wait()
    assert torch.equal(greedy(step, model, ids, 40), expected)
    assert recorder.recorded > 2


def test_no_compilation_begins_where_it_would_disturb(fresh: Any) -> None:
    model, compiler, ids = fresh(), Compiler(), prompts()
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up)
    with warm_up.held():
        for _ in range(2):
            greedy(step, model, ids, 8)
            warm_up.wait()
            assert compiler.programs == 0
    step.close()
    step = step_of(model, warm_up := WarmUp(layers_of(model), compiler))
    greedy(step, model, ids, 8)
    warm_up.wait()
    assert compiler.programs == 1


def test_a_compilation_that_fails_changes_nothing(fresh: Any) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler here\nand more")

    model, recorder, ids = fresh(), Plain(), prompts()
    expected = eager(model, ids, 8)
    warm_up = WarmUp(layers_of(model), Compiler(fail))
    step = step_of(model, warm_up, recorder)
    for _ in range(2):
        assert torch.equal(greedy(step, model, ids, 8), expected)
        warm_up.wait()
    assert "no compiler here" in warm_up.reason
    assert f"layers not compiled: {warm_up.reason}" in warm_up.status
    assert (step.status, recorder.recorded) == ("captured decode", 1)


def test_a_chat_that_outgrows_its_cache_keeps_compiled_layers(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_FIRST_VISIBLE", 32)
    monkeypatch.setattr(capture, "_FIRST_CAPACITY", 32)
    model, compiler, ids = fresh(), Compiler(), prompts()
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up)
    capacities = []
    for room in (40, 40, 90):
        begin(step, prefilled(model, ids), None, room)
        step(ids[:, -1:], 8)
        capacities.append(step._static.capacity)
        status = step.status
        step.give_back(9)
        warm_up.wait()
    assert capacities == [64, 64, 128]
    assert (status, warm_up.reason, compiler.programs) == ("captured decode, compiled layers", "", 1)


def test_layers_that_never_fit_are_given_up(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiler, ids = fresh(), Compiler(), prompts()
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up)
    expected = eager(model, ids, 8)
    for _ in range(5):
        assert torch.equal(greedy(step, model, ids, 8), expected)
        warm_up.wait()
        torch._dynamo.reset()  # nothing that was compiled fits any more
    assert warm_up.reason
    assert compiler.programs == 3
    assert step.status == "captured decode"


def test_nobody_else_takes_a_compilation_for_their_own(fresh: Any) -> None:
    """transformers reads prompts in a slower way where it believes to be compiled.

    Between answers it is as torch has it: a cell of the user's may run what they have compiled.
    """
    usual = torch.compiler._compile_session_context
    release, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert release.wait(60)

    model, ids = fresh(), prompts()
    warm_up = WarmUp(layers_of(model), Compiler(hold))
    try:
        with without_compilation_seen():
            greedy(step_of(model, warm_up), model, ids, 8)  # its end starts the compiler
            assert entered.wait(60)
            assert not torch.compiler.is_compiling()
        assert torch.compiler.is_compiling()
        with without_compilation_seen(), without_compilation_seen():
            assert not torch.compiler.is_compiling()
        assert torch.compiler.is_compiling()
    finally:
        release.set()
    warm_up.wait()
    assert not torch.compiler.is_compiling()
    assert torch.compiler._compile_session_context is usual


def test_a_cache_that_fills_up_is_compiled_to_its_end(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What served during a compilation, and sees all of the cache, is recorded anew when that is what is to be seen."""
    monkeypatch.setattr(capture, "_FIRST_VISIBLE", 32)
    monkeypatch.setattr(capture, "_FIRST_CAPACITY", 64)
    model, ids = fresh(), prompts()
    warm_up = WarmUp(layers_of(model), Compiler())
    step = step_of(model, warm_up)
    for _ in range(3):
        begin(step, prefilled(model, ids), None, 40)
        for length in (8, 40):
            step(ids[:, -1:], length)
        step.give_back(9)
        warm_up.wait()
    assert {shape.visible: graph.compiled for shape, graph in step._graphs.items()} == {32: True, 64: True}


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is here")
def test_without_triton_nothing_is_tried(fresh: Any) -> None:
    model, ids = fresh(), prompts()
    warm_up = WarmUp(layers_of(model))
    step = step_of(model, warm_up)
    greedy(step, model, ids, 8)
    warm_up.wait()
    assert warm_up.reason == "RuntimeError: Triton is not installed"
    assert step.status == "captured decode"


def test_what_does_not_fit_any_more_is_captured_as_it_was_and_compiled_anew(fresh: Any) -> None:
    """A setting that compiled code depends on has changed since."""
    model, compiler, ids = fresh(), Compiler(), prompts()
    expected = eager(model, ids, 8)
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up)
    greedy(step, model, ids, 8)
    warm_up.wait()
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1.1e-6
    assert torch.equal(greedy(step, model, ids, 8), expected)
    assert (step.status, warm_up.reason) == ("captured decode", "")
    warm_up.wait()
    assert torch.equal(greedy(step, model, ids, 8), expected)
    assert (step.status, compiler.programs) == ("captured decode, compiled layers", 2)


def test_a_sweep_that_cannot_be_captured_is_not_compiled(fresh: Any) -> None:
    model, compiler, ids = fresh(), Compiler(), prompts()
    warm_up = WarmUp(layers_of(model), compiler)
    step = step_of(model, warm_up, Failing(RuntimeError("no")))
    assert torch.equal(greedy(step, model, ids, 8), eager(model, ids, 8))
    warm_up.wait()
    assert compiler.programs == 0
    assert warm_up.reason == "sweeps are not captured"


def test_closing_leaves_the_model_as_it_was(fresh: Any) -> None:
    model, ids = fresh(), prompts()
    expected = eager(model, ids, 8)
    warm_up = WarmUp(layers_of(model), Compiler())
    step = step_of(model, warm_up)
    greedy(step, model, ids, 8)
    warm_up.wait()
    greedy(step, model, ids, 8)
    step.close()
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(eager(model, ids, 8), expected)
    assert torch.equal(greedy(step, model, ids, 8), expected)


def test_closing_while_layers_are_compiled(fresh: Any) -> None:
    release, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert release.wait(60)

    model, ids = fresh(), prompts()
    warm_up = WarmUp(layers_of(model), Compiler(hold))
    step = step_of(model, warm_up)
    greedy(step, model, ids, 4)
    assert entered.wait(60)
    step.close()
    release.set()
    warm_up.wait()
    assert "compiled layers" not in warm_up.status
    assert torch.equal(greedy(step, model, ids, 8), eager(model, ids, 8))


def test_joined_projections_are_captured(fresh: Any) -> None:
    """Without compilation; kernels and operands written down one by one."""
    model, tapes, ids = fresh(), Tapes(), prompts()
    expected = eager(model, ids, 12)
    warm_up = WarmUp(layers_of(model), None)
    step = step_of(model, warm_up, tapes)
    assert torch.equal(greedy(step, model, ids, 12), expected)
    assert (warm_up.status, tapes.recorded) == (("joined projections",), 1)
