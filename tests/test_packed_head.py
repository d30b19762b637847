"""A head that is packed beside packed layers, also where it shares its matrix with the embeddings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_magic.backends.accelerate.packed import packing
from llm_magic.backends.accelerate.packed.weights import numbers
from llm_magic.backends.accelerate.quantizing import packed_head
from llm_magic.errors import OptionError
from llm_magic.model import ModelSpec
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.planning.select import edited
from llm_magic.views.commands import command_of
from llm_magic.views.python import python_of
from tests import packed_checkpoints, tiny
from tests.engines import ask, load, plan_for, request
from tests.packed import held_weights
from tests.packed_checkpoints import save_awq, save_bitsandbytes

METHODS = ("nf4", "fp4", "int8", "int4", "int2", "float8", "quanto-int8")
PROMPT = "The capital of France"
_OPTIONS = {"quantize": "nf4", "quantize-head": "int8"}
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed-head") / "model"
    return tiny.save_llama(path, tied=request.param == "tied", **WIDE)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("packed-head") / "tied", tied=True, **WIDE)


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def engine(folder: Path, head: str = "int8", placement: str = "ram", method: str = "nf4") -> Any:
        spec = ModelSpec(str(folder), quantize=method, quantize_head=head)
        made.append(load(folder, placement, spec=spec))
        return made[-1]

    yield engine
    for found in made:
        found.close()


def numbers_of(head: Any) -> Any:
    found = packing.parts(head, "weight")
    if "SCB" in found:
        return found[""].float() * found["SCB"].view(-1, 1) / 127
    return numbers(head.weight).float()


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_packed_matrix(
    method: str, folder: Path, engine_of: Callable[..., Any]
) -> None:
    model = engine_of(folder, method).model
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, outputs: seen.extend((inputs[0], outputs)))
    with torch.no_grad():
        model(input_ids=torch.arange(6, 18)[None])
    states, logits = seen
    torch.testing.assert_close(logits, states @ numbers_of(model.lm_head).T, rtol=1e-3, atol=1e-3)
    file = load_file(folder / "model.safetensors")
    table = file["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, table)
    plain = states @ file.get("lm_head.weight", table).T
    assert torch.nn.functional.cosine_similarity(logits, plain, dim=-1).min() > (
        0.8 if method == "int2" else 0.98
    )


@pytest.mark.parametrize("method", ["nf4", "int8", "int4"])
def test_the_same_tokens_wherever_it_is(method: str, folder: Path, engine_of: Callable[..., Any]) -> None:
    texts = set()
    for placement in ("ram", "half", "disk", "mapped"):
        engine = engine_of(folder, method, placement)
        texts |= {ask(engine, PROMPT).text, ask(engine, PROMPT).text}
        assert held_weights(engine) == engine.plan.layout.bytes
    assert len(texts) == 1


def test_it_moves_while_loaded(tied: Path, engine_of: Callable[..., Any]) -> None:
    engine = engine_of(tied)
    expected = ask(engine, request(PROMPT, chat="c")).text
    for block in ("lm_head", "model.embed_tokens"):
        for device in ("disk", "cpu"):
            plan = engine.plan
            homes = edited(plan, {block: device})
            facts = {"placement": homes, "policy": "moved", "options": plan.options}
            engine.apply(make_plan(plan.layout, plan.machine, plan.workload, **facts), lambda _event: None)
            assert ask(engine, PROMPT).text == expected


def test_embeddings_leave_ram_before_any_layer_does(tied: Path) -> None:
    spec = ModelSpec(str(tied), quantize="nf4", quantize_head="int8")
    _, plan = plan_for(tied, "ram", spec=spec)
    homes = {place.block.label: place.home for place in plan.placements}
    assert homes["embed"] == "cpu"
    limit = {"cpu": next(use.planned for use in plan.uses if use.device == "cpu") - 1}
    tight = make_plan(
        plan.layout, plan.machine, plan.workload, placement=POLICIES[0], policy="auto", max_memory=limit
    )
    homes = {place.block.label: place.home for place in tight.placements}
    assert [label for label, home in homes.items() if home == "disk"] == ["embed"]


def test_tying_anew_leaves_it_alone(tied: Path, engine_of: Callable[..., Any]) -> None:
    model = engine_of(tied).model
    before = model.lm_head.weight
    model.tie_weights()
    assert model.lm_head.weight is before


def test_other_ties_stay(tmp_path: Path) -> None:
    """T5's encoder and decoder share their embeddings with the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, d_ff=64, d_kv=16, num_heads=4, num_layers=2, vocab_size=96)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    packed_head.untie_head(model, "lm_head")
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    assert model.lm_head.weight is not model.shared.weight
    kept = model.lm_head.weight
    packed_head.untie_head(model, "lm_head")
    assert model.lm_head.weight is kept


@pytest.mark.parametrize(
    ("ties", "left"),
    [
        ({"head": "embed"}, {}),
        ({"embed": "head"}, {}),
        ({"embed": "head", "encoder": "head", "a": "b"}, {"encoder": "embed", "a": "b"}),
    ],
)
def test_who_had_its_values_share_them_without_it(ties: dict[str, str], left: dict[str, str]) -> None:
    assert packed_head._without(ties, "head") == left


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("save", [save_bitsandbytes, save_awq])
def test_beside_layers_that_were_packed_before(
    save: Any, tied: bool, tmp_path: Path, engine_of: Callable[..., Any]
) -> None:
    kind = ("nf4",) if save is save_bitsandbytes else ()
    folder = save(tmp_path / "model", *kind, tiny.save_llama, tied=tied, **WIDE)
    usual, packed = (engine_of(folder, head, method="") for head in ("", "int8"))
    assert type(packed.model.lm_head).__name__ == "Linear8bitLt"
    tokens = torch.arange(6, 18)[None]
    with torch.no_grad():
        expected, found = (engine.model(input_ids=tokens).logits.float() for engine in (usual, packed))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999
    assert ask(packed, PROMPT).text


# ------------------------------------------------------------------------------------------ refusals


def test_it_is_packed_beside_packed_layers_alone(folder: Path) -> None:
    with pytest.raises(OptionError, match="Add --quantize METHOD"):
        plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize_head="int8"))


def test_a_head_that_is_packed_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_checkpoints, "_LINEAR", re.compile(r"(_proj|lm_head)\.weight$"))
    folder = save_bitsandbytes(tmp_path / "model", "nf4", tied=False, **WIDE)
    with pytest.raises(OptionError, match="packed already"):
        plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize_head="int8"))


def test_a_head_that_its_model_reads_as_numbers_stays(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_magic.backends.accelerate.quantizing import prepare

    monkeypatch.setattr(prepare, "reads_head", lambda _model, path: path == "lm_head")
    with pytest.raises(OptionError, match="looks at its head's weight"):
        plan_for(tied, "ram", spec=ModelSpec(str(tied), quantize="nf4", quantize_head="int8"))


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_a_head_to_whose_dtype_states_are_cast_stays(head: str, tmp_path: Path) -> None:
    """Of packed bytes that is one of integers: states would be whole numbers."""
    folder = tiny.save_mamba(tmp_path / "model")
    with pytest.raises(OptionError, match="looks at its head's weight"):
        plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="nf4", quantize_head=head))
    _, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="nf4"))
    assert not any("--quantize-head" in warning for warning in plan.warnings)


def test_a_head_alone_is_no_packed_model(tmp_path: Path) -> None:
    folder = tiny.MODELS["gpt2"](tmp_path / "model")
    with pytest.raises(OptionError, match="finds no linear layer to pack"):
        plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="int4", quantize_head="int8"))


@pytest.mark.parametrize("head", ["", "int8"])
def test_files_that_have_the_matrix_of_both_under_the_heads_name(
    head: str, tied: Path, tmp_path: Path, engine_of: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ask(engine_of(folder, head), PROMPT).text == ask(engine_of(tied, head), PROMPT).text


@pytest.mark.parametrize("placement", ["ram", "half", "disk"])
def test_a_tied_head_of_a_pickled_checkpoint(placement: str, tied: Path, tmp_path: Path) -> None:
    """What transformers has written of the embeddings is there until the head has it, too."""
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    offload = tmp_path / "offload"
    offload.mkdir()
    texts = []
    for source, allow_pickle in ((folder, True), (tied, False)):
        spec = ModelSpec(str(source), quantize="nf4", quantize_head="int8", allow_pickle=allow_pickle)
        engine = load(source, placement, spec=spec, options={"offload_folder": str(offload)})
        texts.append(ask(engine, PROMPT).text)
        assert placement == "disk" or not list(offload.rglob("*embed_tokens*"))
        engine.close()
    assert texts[0] == texts[1]


def test_it_cannot_be_saved(tied: Path, engine_of: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="whose head is packed"):
        engine_of(tied).model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -------------------------------------------------------------------------------------- what is said


def test_plans_say_what_it_is_worth(tied: Path) -> None:
    plans = [
        plan_for(tied, "ram", spec=ModelSpec(str(tied), quantize="nf4", quantize_head=head))[1]
        for head in ("", "int8")
    ]
    assert any("--quantize-head int8" in warning for warning in plans[0].warnings)
    assert not any("--quantize-head" in warning for warning in plans[1].warnings)
    assert plans[1].layout.packing == "nf4 (head int8)"
    assert "leaves the head as it is" in python_of(plans[1])
    assert "leaves the head" not in python_of(plans[0])
    assert "--quantize-head" not in command_of(plans[0])
    assert "--quantize nf4 --quantize-head int8" in command_of(replace(plans[1], options=_OPTIONS))
