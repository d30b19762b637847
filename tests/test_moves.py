"""Moving blocks of a loaded model: the next logits are bit-equal, and only what moved is counted, kept or written."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.errors import PlanError
from llm_magic.plan import Plan
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from tests import tiny
from tests.engines import ask, load
from tests.placements import (
    HOMES,
    everywhere,
    layers_to,
    load_placed,
    logits,
    mixed_plan,
    placed_plan,
    stock,
)

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]


@pytest.fixture
def offload(cache_folder: Path) -> Path:
    """Where weights are written when they have to be; it does not exist before that."""
    return cache_folder / "offload"


def random_plan(plan: Plan, chance: random.Random) -> Plan:
    labels = [place.block.label for place in plan.placements]
    some = chance.sample(labels, chance.randint(1, len(labels)))
    homes = {label: chance.choice(list(HOMES)) for label in some}
    return mixed_plan(plan, homes, mapped=chance.random() < 0.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "mamba"])
def test_any_moves_keep_the_logits_and_count_what_moved(
    name: str, seed: int, tiny_model: TinyModel, streams: Streams, offload: Path
) -> None:
    folder, chance = tiny_model(name), random.Random(seed)
    model = stock(folder)
    if name == "qwen3-moe":
        model.set_experts_implementation("eager")
    expected = logits(model)
    placed = load_placed(folder, None, streams)
    for _ in range(8):
        before = placed.plan
        plan = random_plan(before, chance)
        moved = placed.apply(plan)
        if name == "qwen3-moe":
            placed.model.set_experts_implementation("eager")
        assert moved == bytes_between(before, plan)
        assert placed.plan is plan
        assert placed.model.hf_device_map == plan.device_map
        check_memory(placed)
        for _ in range(2):
            assert torch.equal(logits(placed.model), expected)
    assert offload.exists() == (name == "qwen3-moe" and "disk" in {home for _, home in every_home(placed)})
    placed.close()
    assert not offload.exists() or not list(offload.iterdir())


def every_home(placed: PlacedModel) -> list[tuple[str, str]]:
    return [(name, "disk") for name, block in placed.blocks.items() if block.file is not None]


def bytes_between(before: Plan, after: Plan) -> Counter[tuple[str, str]]:
    moved: Counter[tuple[str, str]] = Counter()
    for old, new in zip(before.placements, after.placements, strict=True):
        if old.home != new.home:
            moved[old.home, new.home] += old.block.bytes
    return moved


def check_memory(placed: PlacedModel) -> None:
    memory = placed.memory()
    for device in {place.home for place in placed.plan.placements}:
        places = [place for place in placed.plan.placements if place.home == device]
        assert memory[device]["weights"] == sum(place.block.bytes for place in places)
    kept = sum(place.block.bytes for place in placed.plan.placements if place.kept)
    assert memory.get("cpu", Counter())["kept"] == kept


@pytest.mark.parametrize("target", HOMES)
@pytest.mark.parametrize("source", HOMES)
def test_from_every_place_to_every_other(
    source: str, target: str, tiny_model: TinyModel, streams: Streams, offload: Path
) -> None:
    folder = tiny_model("llama-tied")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, everywhere(source)), streams)
    assert torch.equal(logits(placed.model), expected)
    placed.apply(placed_plan(folder, layers_to(target)))
    assert torch.equal(logits(placed.model), expected)
    placed.apply(placed_plan(folder, everywhere(target)))
    assert torch.equal(logits(placed.model), expected)
    assert not offload.exists()
    placed.close()


def test_mapped_blocks_become_read_ones_and_back(tiny_model: TinyModel, offload: Path) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    placed = load_placed(folder)
    for mapped in (True, False, True):
        placed.apply(placed_plan(folder, layers_to("read"), mapped=mapped))
        assert bool(placed.lanes) != mapped
        assert torch.equal(logits(placed.model), expected)
    assert not offload.exists()
    placed.close()


# ---------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_are_written_once(dtype: Any, tiny_model: TinyModel, offload: Path) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder, dtype=dtype))
    placed = load_placed(folder, dtype=dtype)
    for home in ("read", "cpu", "read"):
        placed.apply(placed_plan(folder, layers_to(home)))
        assert torch.equal(logits(placed.model), expected)
    assert len(written(offload)) == 4  # one file for each layer, however often it goes there
    placed.close()
    assert written(offload) == []


def test_only_converted_stacks_are_written(tiny_model: TinyModel, offload: Path) -> None:
    folder = tiny_model("qwen3-moe")
    placed = load_placed(folder, placed_plan(folder, everywhere("read")))
    plan = placed.plan
    (size,) = {place.block.bytes for place in plan.placements if place.block.label.startswith("layers.")}
    assert len(written(offload)) == 4
    assert sum(path.stat().st_size for path in written(offload)) <= 4 * size
    placed.close()
    assert written(offload) == []


def test_values_that_differ_from_the_file_are_written_though_name_dtype_and_shape_agree(
    tiny_model: TinyModel, offload: Path
) -> None:
    """As when a weight was converted into one of the same name."""
    folder = tiny_model("llama")
    placed = load_placed(folder)
    model = stock(folder)
    for each in (placed.model, model):
        each.model.layers[2].mlp.up_proj.weight.mul_(2)
    expected = logits(model)
    for home in ("read", "streamed", "read to a GPU", "cpu", "read"):
        placed.apply(placed_plan(folder, layers_to(home)))
        assert torch.equal(logits(placed.model), expected)
    assert [path.name for path in written(offload)] == ["model.layers.2.bin"]
    placed.close()


def written(offload: Path) -> list[Path]:
    return sorted(path for path in offload.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------- undone moves


class Halted(Exception):
    pass


@pytest.mark.parametrize("error", [Halted, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_what_report_raises_at_any_step_puts_every_block_back(
    name: str, error: type[BaseException], tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model(name)
    model = stock(folder)
    if name == "qwen3-moe":
        model.set_experts_implementation("eager")
    expected = logits(model)
    sources = {"embed": "streamed", "layers.0": "read", "layers.1": "kept for a GPU", "layers.3": "streamed"}
    placed = load_placed(folder, None, streams)
    placed.apply(mixed_plan(placed.plan, sources))
    placed.model.set_experts_implementation("eager")
    before, homes = placed.plan, ["cpu", "read", "read to a GPU"]
    for home in homes:
        target = placed_plan(folder, everywhere(home))
        for at in range(7):

            def report(done: int, total: int, _label: str, at: int = at) -> None:
                if done == min(at, total):
                    raise error

            with pytest.raises(error):
                placed.apply(target, report)
            assert placed.plan is before
            assert placed.model.hf_device_map == before.device_map
            check_memory(placed)
            assert torch.equal(logits(placed.model), expected)
    placed.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_while_lanes_are_made_puts_every_block_back(
    error: type[BaseException], tiny_model: TinyModel
) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    faults = 0

    def faulty(_device: str) -> None:
        nonlocal faults
        if faults:
            faults -= 1
            raise error

    placed = load_placed(folder, None, faulty)
    faults = 1
    with pytest.raises(error):
        placed.apply(placed_plan(folder, layers_to("read")))
    assert {place.way for place in placed.plan.placements} == {"cpu"}
    assert torch.equal(logits(placed.model), expected)
    placed.apply(placed_plan(folder, layers_to("read")))
    assert torch.equal(logits(placed.model), expected)
    placed.close()


CHILD = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from llm_magic.errors import PlanError
from tests.placements import layers_to, load_placed, logits, placed_plan
folder, place = Path(sys.argv[2]), sys.argv[3]
options = {"offload_folder": place}
placed = load_placed(folder, placed_plan(folder, layers_to("cpu"), options=options), dtype=torch.bfloat16)
expected = logits(placed.model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
target = placed_plan(folder, layers_to("read"), options=options)
try:
    placed.apply(target)
except PlanError as error:
    print(error)
assert {p.way for p in placed.plan.placements} == {"cpu"}
assert torch.equal(logits(placed.model), expected)
assert not [f for f in Path(place).rglob("*") if f.is_file()], "a part was left"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
placed.apply(target)
assert torch.equal(logits(placed.model), expected)
placed.close()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_full_disk_puts_every_block_back_and_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    root, place = str(Path(__file__).parent.parent), tmp_path / "place"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, root, str(tiny_model("llama")), str(place)],
        env=os.environ | {"LLM_MAGIC_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "The disk is full: no room in place for offloaded weights" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("done"), done.stderr
    assert list(place.iterdir()) == []


# ------------------------------------------------------------------------------------- what is freed


def test_memory_of_what_moved_is_given_back(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder)

    def buffers() -> list[Any]:
        """What holds the layers' bytes now."""
        weights = [p for layer in placed.model.model.layers for p in layer.parameters() if not p.is_meta]
        stores = [b.store for n, b in placed.blocks.items() if ".layers." in n and hasattr(b.store, "memory")]
        return [weakref.ref(held) for held in (*weights, *stores)]

    homes = ("streamed", "resident", "kept", "read", "kept for a GPU", "cpu", "read to a GPU")
    for home in homes:
        held = buffers()
        placed.apply(placed_plan(folder, layers_to(home)))
        logits(placed.model)
        gc.collect()
        now = {id(ref()) for ref in buffers()}
        assert all(ref() is None or id(ref()) in now for ref in held), home
    held = buffers()
    placed.close()
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_a_block_that_moves_takes_no_other_along(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, None, streams)
    weights = {name: weight.data_ptr() for name, weight in placed.model.named_parameters()}
    placed.apply(mixed_plan(placed.plan, {"layers.1": "read", "layers.2": "kept"}))
    for name, weight in placed.model.named_parameters():
        if not name.startswith(("model.layers.1.", "model.layers.2.")):
            assert weight.data_ptr() == weights[name]
    placed.close()


def test_close_after_moves_leaves_no_folder_and_no_open_file(
    tmp_path: Path, tiny_model: TinyModel, offload: Path
) -> None:
    import psutil

    folder = tiny.save_llama(tmp_path / "model")
    placed = load_placed(folder, dtype=torch.bfloat16)
    for mapped in (False, True):
        placed.apply(placed_plan(folder, everywhere("read"), mapped=mapped))
        logits(placed.model)
    assert written(offload)
    placed.close()
    assert list(offload.iterdir()) == []
    open_files = {Path(file.path) for file in psutil.Process().open_files()}
    assert not [path for path in open_files if path.is_relative_to(tmp_path)]


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("rows", [tiny.VOCABULARY + 16, tiny.VOCABULARY - 16])
def test_a_resized_embedding_stays_and_says_what_to_do(
    name: str, home: str, rows: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    engine = load(tiny_model(name))
    if home == "disk":
        engine.apply(moved(engine.plan, "embed", "disk"), lambda _: None)
    engine.model.resize_token_embeddings(rows, mean_resizing=False)
    expected, before = ask(engine, "The capital").text, engine.plan
    other = "cpu" if home == "disk" else "disk"
    for label in ("embed", "head"):
        with pytest.raises(PlanError, match="has another shape than it was loaded with") as caught:
            engine.apply(moved(before, label, other), lambda _: None)
        assert "save_pretrained" in caught.value.next_step
        assert engine.plan is before
    if home == "cpu":  # then nothing is held elsewhere
        engine.apply(moved(before, "layers.1", "disk"), lambda _: None)
    assert engine.model.get_input_embeddings().weight.shape[0] == rows
    assert ask(engine, "The capital").text == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Accelerate's, of offloaded modules
        engine.model.save_pretrained(tmp_path / "again")
    engine.tokenizer.save_pretrained(tmp_path / "again")
    engine.close()
    again = load(tmp_path / "again")
    again.apply(moved(again.plan, "embed", "disk"), lambda _: None)
    assert ask(again, "The capital").text == expected
    again.close()


def moved(plan: Plan, label: str, device: str) -> Plan:
    """A plan with one block elsewhere, and what is tied to it."""
    name = next(place.block.name for place in plan.placements if place.block.label == label)
    return make_plan(
        plan.layout, plan.machine, plan.workload, placement=edited(plan, {name: device}), policy="hand"
    )
