"""Models of images and text, asked by text alone, against plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.source.skeleton import load_config
from llm_magic.backends.accelerate.source.sources import resolve
from llm_magic.errors import SourceError
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from llm_magic.views.python import python_of
from tests import tiny
from tests.engines import BACKEND, MAPS, ask, load, plan_for, request
from tests.test_chat_template import SMOLVLM
from tests.test_engine import LONG, fed_lengths, load_tight

PROMPT = "The capital of France is <|user|> Paris, and"  # the token in it stands for an image
QUESTIONS = ("The capital of France is Paris, and the capital of Italy?", "And of <|user|> Spain?", "Why?")
TinyModel = Callable[[str], Path]

TOWERS = {
    "llava-next": ["image_newline", "vision_tower", "multi_modal_projector"],
    "mistral3": ["vision_tower", "multi_modal_projector"],
    "llava": ["vision_tower", "multi_modal_projector"],
    "gemma3": ["vision_tower", "multi_modal_projector"],
    "smolvlm": ["vision_model", "connector"],
    "idefics3": ["vision_model", "connector"],
    "qwen2.5-vl": ["visual"],
    "qwen3-vl": ["visual"],
    "glm4v": ["visual"],
}
POSITIONED = ["qwen2.5-vl", "qwen3-vl", "glm4v"]
"""Models whose tokens have positions in three dimensions."""


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


class Plain:
    """The model as transformers runs it, every answer from scratch."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model, self.tokenizer = plain_model(folder), AutoTokenizer.from_pretrained(folder)

    def answer(self, prompt: str, tokens: int = 24, **options: Any) -> str:
        import torch

        ids = torch.tensor([self.tokenizer(prompt, **options).input_ids])
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
        )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def chat(self, contents: list[str], tokens: int = 12) -> str:
        messages = [
            {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.answer(text, tokens, add_special_tokens=False)


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel) -> Callable[[str], Plain]:
    found: dict[str, Plain] = {}

    def of(name: str) -> Plain:
        if name not in found:
            found[name] = Plain(tiny_model(name))
        return found[name]

    return of


def layout_of(folder: Path) -> ModelLayout:
    return BACKEND.layout(ModelSpec(str(folder)), lambda _event: None)


# ------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", tiny.VISION_MODELS)
def test_a_tower_is_one_block_at_the_end(name: str, tiny_model: TinyModel) -> None:
    layout = layout_of(tiny_model(name))
    layers = [f"layers.{number}" for number in range(tiny.LAYERS)]
    assert [block.label for block in layout.layers] == layers
    assert {block.kind for block in layout.layers} == {"decoder"}
    used = ["embed", "rotary_emb", *layers, "norm", "head"]
    assert [block.label for block in layout.blocks] == used + TOWERS[name]
    assert [block.label for block in layout.blocks if block.is_idle] == TOWERS[name]
    assert {block.label: block.kind for block in layout.blocks}["head"] == "head"
    # keys and values of 16 float32 each, for 2 heads or all 4
    width = 4 if name in ("llava", "llava-next", "smolvlm", "idefics3") else 2
    assert {block.cache.bytes_per_token for block in layout.layers} == {2 * width * 16 * 4}
    assert not any(block.cache.bytes_per_token for block in layout.blocks if block.is_idle)
    facts = (layout.hidden_size, layout.intermediate_size, layout.vocab_size, layout.context_length)
    assert facts == (64, 128, tiny.VOCABULARY, tiny.CONTEXT)
    assert layout.has_chat_template


@pytest.mark.parametrize("name", tiny.VISION_MODELS)
def test_every_parameter_is_in_one_block(
    name: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    layout, model = layout_of(tiny_model(name)), plain(name).model
    counted = [tensor.name for block in layout.blocks for tensor in block.tensors]
    assert sorted(counted) == sorted(name for name, _ in model.named_parameters())
    assert layout.architecture == type(model).__name__


@pytest.mark.parametrize("name", tiny.VISION_MODELS)
def test_text_visits_the_other_blocks_in_their_order(
    name: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    import torch

    layout, model, ran = layout_of(tiny_model(name)), plain(name).model, []
    modules, handles = dict(model.named_modules()), []
    for block in layout.blocks:
        if block.name in modules:
            seen = partial(lambda label, *_: ran.append(label), block.label)
            handles.append(modules[block.name].register_forward_pre_hook(seen))
    model(torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    assert list(dict.fromkeys(ran)) == [block.label for block in layout.blocks if not block.is_idle]


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", tiny.VISION_MODELS)
@pytest.mark.parametrize("placement", MAPS)
def test_the_same_greedy_tokens_wherever_the_blocks_are(
    name: str, placement: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    engine = load(tiny_model(name), placement)
    try:
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == plain(name).answer(PROMPT)
        held = engine.memory()
        module_bytes = engine.plan.layout.bytes - _bare_bytes(engine.plan.layout)
        assert held["cpu"]["weights"] + held.get("disk", {}).get("weights", 0) == module_bytes
        largest = max(block.bytes for block in engine.plan.layout.blocks if not block.is_idle)
        # Towers are larger than layers. Two slots, each with up to a page at either end.
        assert held["cpu"].get("slots", 0) <= 2 * (largest + 2 * 4096)
    finally:
        engine.close()


def _bare_bytes(layout: ModelLayout) -> int:
    """What no module holds, and ``memory`` leaves out."""
    return sum(block.bytes for block in layout.blocks if block.label == "image_newline")


@pytest.mark.parametrize("name", tiny.VISION_MODELS)
@pytest.mark.parametrize("placement", ["ram", "half"])
def test_turns_of_a_chat_are_answered_as_from_scratch(
    name: str, placement: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    engine, contents = load(tiny_model(name), placement), list[str]()
    try:
        for turn, question in enumerate(QUESTIONS):
            contents.append(question)
            answer = ask(engine, request(*contents, chat="talk", use_template=True))
            assert answer.text == plain(name).chat(contents)
            assert (answer.finish.cached_tokens > 0) == (turn > 0)
            contents.append(answer.text)
    finally:
        engine.close()


@pytest.mark.parametrize("name", [*POSITIONED, "mistral3"])
def test_a_prompt_in_parts_is_answered_as_from_scratch(
    name: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    engine = load_tight(tiny_model(name), "half")
    try:
        contents = [LONG[: len(LONG) * 5 // 9]]  # several parts, and the answers within the context
        for question in ("And of Germany, and of Spain? Say it in one word.", "Why?"):
            with fed_lengths(engine) as lengths:
                text = ask(engine, request(*contents, chat="talk")).text
            is_first = len(contents) == 1
            assert sum(length > 12 for length in lengths) > is_first
            assert text == plain(name).answer("\n".join(contents), 12)
            contents += [text, question]
    finally:
        engine.close()


@pytest.mark.parametrize("name", POSITIONED)
def test_positions_of_images_before_a_chat_do_not_reach_it(
    name: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    import torch

    engine = load(tiny_model(name), "ram")
    try:
        first = ask(engine, request(QUESTIONS[0], chat="talk", use_template=True)).text
        assert engine.model.model.rope_deltas is not None
        # As a call of the model by hand leaves them, with an image, or on another device.
        engine.model.model.rope_deltas = torch.full((1, 1), -7, device="meta")
        contents = [QUESTIONS[0], first, QUESTIONS[1]]
        answer = ask(engine, request(*contents, chat="talk", use_template=True))
        assert answer.finish.cached_tokens > 0
        assert answer.text == plain(name).chat(contents)
    finally:
        engine.close()


def test_a_small_model_that_sees_proposes_for_a_large_one(
    tiny_model: TinyModel, tmp_path: Path, plain: Callable[[str], Plain]
) -> None:
    folder, draft = tiny_model("qwen3-vl"), tiny.save_qwen3_vl(tmp_path / "draft", num_hidden_layers=2)
    engine = load(folder, "half", spec=ModelSpec(str(folder), draft=str(draft)))
    try:
        for turn in range(2):  # its positions go on behind a cache of its own
            asked = request(PROMPT, *["so", "and"] * turn, max_new_tokens=24)
            text = "\n".join([PROMPT, *["so", "and"] * turn])
            assert ask(engine, asked).text == plain("qwen3-vl").answer(text)
        assert engine.plan.layout.draft.architecture == "Qwen3VLForConditionalGeneration"
    finally:
        engine.close()


def test_its_sweeps_are_measured(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("qwen2.5-vl"), "half")
    try:
        assert engine.measure(lambda _event: None).decode_s > 0
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


# ---------------------------------------------------------------------------------- where a tower is


def moved(engine: Any, homes: dict[str, str]) -> dict[tuple[str, str], int]:
    plan = engine.plan
    new = make_plan(
        plan.layout,
        plan.machine,
        plan.workload,
        placement=edited(plan, homes),
        policy="moved",
        options=plan.options,
    )
    return dict(engine.apply(new, lambda _event: None))


@pytest.fixture
def qwen(tiny_model: TinyModel) -> Iterator[Any]:
    engine = load(tiny_model("qwen2.5-vl"), "ram")
    yield engine
    engine.close()


def seen(model: Any) -> Any:
    """What the tower of a tiny Qwen2.5-VL makes of an image of 2 x 2 patches, every pixel another one."""
    import torch

    pixels = torch.linspace(-1, 1, 4 * 3 * 2 * 14 * 14).reshape(4, -1)
    with torch.no_grad():
        return model.get_image_features(pixels, torch.tensor([[1, 2, 2]])).pooler_output[0]


def test_a_tower_moves_and_works_for_whoever_calls_it(qwen: Any, plain: Callable[[str], Plain]) -> None:
    import torch

    tower = qwen.plan.layout.block("visual")
    expected = seen(plain("qwen2.5-vl").model)
    assert torch.equal(seen(qwen.model), expected)
    for source, target in (("cpu", "disk"), ("disk", "cpu"), ("cpu", "disk")):
        assert moved(qwen, {tower.name: target}) == {(source, target): tower.bytes}
        # In a mapped file weights lie at multiples of 8 bytes: some processors add them up in another order then.
        torch.testing.assert_close(seen(qwen.model), expected, rtol=1e-5, atol=1e-6)
        assert ask(qwen, PROMPT).text == plain("qwen2.5-vl").answer(PROMPT, 12)
        assert qwen.memory().get("disk", {}).get("weights", 0) == (tower.bytes if target == "disk" else 0)
        assert "slots" not in qwen.memory()["cpu"]
        assert qwen.status() == ("recorded layers",)  # nothing travels, and no tokens are guessed


@pytest.mark.parametrize("placement", ["ram", "half", "disk"])
def test_a_packed_model_answers_as_transformers_packs_it(
    placement: str, tiny_model: TinyModel, plain: Callable[[str], Plain]
) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from llm_magic.backends.accelerate.quiet import quiet

    folder = tiny_model("mistral3")
    engine = load(folder, placement, spec=ModelSpec(str(folder), quantize="nf4"))
    tower = engine.plan.layout.block("vision_tower")
    try:
        moved(engine, {tower.name: "disk"})
        text = ask(engine, PROMPT).text
    finally:
        engine.close()
    with quiet():
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        packed = Plain(folder)
        packed.model = AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=config, device_map="cpu"
        )
        assert packed.answer(PROMPT, 12) == text


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_fp8_of_the_language_model_alone_is_found(place: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    packed = shutil.copytree(tiny_model("mistral3"), tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    part = config if place == "top" else config["text_config"]
    part["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    (packed / "config.json").write_text(json.dumps(config))
    assert load_config(resolve(ModelSpec(str(packed)), lambda _event: None)).quantization_config["dequantize"]
    layout = layout_of(packed)
    assert layout.details["quantization"] == "fp8"
    assert layout.bytes == layout_of(tiny_model("mistral3")).bytes


def test_the_python_to_copy_loads_the_same(tiny_model: TinyModel, plain: Callable[[str], Plain]) -> None:
    import torch

    _, plan = plan_for(tiny_model("llava"), "ram")
    code = python_of(plan).replace(f'"{plan.source}"', repr(str(tiny_model("llava"))))
    scope: dict[str, Any] = {}
    exec(code, scope)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(scope["model"](ids).logits, plain("llava").model(ids).logits)


# ----------------------------------------------------------------------------------------- templates


def test_a_template_for_the_processor_alone_is_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("smolvlm"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert not layout_of(folder).has_chat_template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": SMOLVLM}))
    assert layout_of(folder).has_chat_template
    engine = load(folder, "ram")
    try:
        rendered = engine.render(request("What is it?", "Rome.", "Why?", use_template=True)).text
        assert rendered == (
            "<|im_start|>User: What is it?<end_of_utterance>\nAssistant: Rome.<end_of_utterance>\n"
            "User: Why?<end_of_utterance>\nAssistant:"
        )
    finally:
        engine.close()


# ----------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("idefics", "needs an image with every prompt"),
        ("blip-2", "needs an image with every prompt"),
        ("pix2struct", "needs an image with every prompt"),
        ("florence2", "needs an image with every prompt"),
        ("kosmos-2", "in a way of its own"),
        ("janus", "in a way of its own"),
        ("pi0", "does not generate text"),
        ("whisper", "speech or sound"),
        ("qwen2_audio", "speech or sound"),
    ],
)
def test_what_text_alone_cannot_ask_is_refused_with_the_reason(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(SourceError, match=reason) as caught:
        layout_of(tmp_path)
    assert repr(model_type) in caught.value.message
    assert caught.value.next_step


def test_all_others_that_transformers_knows_are_taken() -> None:
    """None is refused because of a rule that was made for others."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from llm_magic.backends.accelerate.architecture import auto_class

    # transformers 5.17 makes no such configuration without saying of what.
    parts = {"vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}}
    refused = set()
    for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        try:
            auto_class(CONFIG_MAPPING[model_type](**parts.get(model_type, {})))
        except SourceError:
            refused.add(model_type)
    assert refused <= {
        *("blip", "blip-2", "instructblip", "instructblipvideo", "idefics"),
        *("florence2", "pix2struct", "pp_formulanet", "udop", "vision-encoder-decoder"),
        *("diffusion_gemma", "janus", "kosmos-2", "pi0", "evolla"),
    }
