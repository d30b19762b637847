"""Multi-head latent attention: few tokens attend to latents, whoever computes, and all else is as transformers has it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from llm_magic.backends.accelerate.decoding import attention, cpu_attention, static_cache  # noqa: E402
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS  # noqa: E402
from llm_magic.backends.accelerate.kernels import cpu_products  # noqa: E402
from llm_magic.backends.accelerate.served import latent_attention  # noqa: E402
from llm_magic.backends.accelerate.served_model import serve_plain_modules  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests import families, tiny  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.engines import ask, load, request  # noqa: E402
from tests.test_cpu_attention import ERRORS, expected, is_close, states  # noqa: E402
from tests.test_cpu_products import packed  # noqa: E402

_LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 4}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_FOUR_HEADS = {"num_key_value_heads": 4}
_SPARSE = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 4}

MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | _EXPERTS | _GROUPS | _FOUR_HEADS,
    "deepseek_v3": _LATENT | _EXPERTS | _GROUPS | _FOUR_HEADS,
    "glm4_moe_lite": _LATENT | _EXPERTS | _FOUR_HEADS | {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "glm_moe_dsa": _LATENT | _EXPERTS | _GROUPS | _FOUR_HEADS | _SPARSE,
    "kimi_linear": families.FAMILIES["kimi_linear"] | _LATENT,
    "minicpm3": _LATENT | _FOUR_HEADS,
    "youtu": _LATENT | _FOUR_HEADS,
}
FULL = [name for name in MODELS if name not in ("glm_moe_dsa", "kimi_linear")]
"""Those whose layers are all of this attention, and see all tokens."""


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def made(name: str, dtype: Any = torch.float32, **own: Any) -> Any:
    settings = (
        {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 128} | MODELS[name] | own
    )
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 2}
    config = AutoConfig.for_model(name, **{**heads, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def fed(model: Any, lengths: list[int], batch: int = 2, **options: Any) -> Any:
    """Logits of a text that is fed in parts."""
    ids = torch.randint(6, tiny.VOCABULARY, (batch, sum(lengths)), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, **given(cache), **options).logits for part in ids.split(lengths, 1)], 1)


class Expansions:
    """How many latents modules have expanded, by pass."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[int] = []
        modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
        kinds = {getattr(module, latent_attention._MARK, type(module)) for module in modules}
        assert kinds
        for kind in kinds:
            monkeypatch.setattr(kind, "expand_kv", self._counted(kind.expand_kv))

    def _counted(self, usual: Any) -> Any:
        def expand_kv(module: Any, latents: Any, rotated: Any) -> Any:
            self.places.append(latents.shape[2])
            return usual(module, latents, rotated)

        return expand_kv


@pytest.mark.parametrize("by_kernel", [False, True], ids=["by torch", "by kernels"])
@pytest.mark.parametrize("name", MODELS)
def test_few_tokens_find_what_they_find_in_keys_and_values(
    name: str, monkeypatch: pytest.MonkeyPatch, *, by_kernel: bool
) -> None:
    """Those of a prompt are expanded, as before."""
    model = made(name)
    lengths = [20, 1, 5, 1, FEW_TOKENS, FEW_TOKENS + 1, 1]
    batch = 1 if name == "kimi_linear" else 2
    wanted = fed(model, lengths, batch)
    attention.use_latents(model)
    if by_kernel:
        attention.use_on_cpu(model)
    of_layers = sum(latent_attention.hands_on(module) for module in model.modules())
    seen = Expansions(model, monkeypatch)
    torch.testing.assert_close(fed(model, lengths, batch), wanted, atol=3e-4, rtol=1e-3)
    assert of_layers == (2 if name == "kimi_linear" else 4)
    assert seen.places == [20] * of_layers + [sum(lengths[:-1])] * of_layers


def test_padded_batches() -> None:
    model = made("deepseek_v3")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    wanted = [fed(model, [12], attention_mask=mask), fed(model, [12])]
    attention.use_latents(model)
    for by_kernel in (False, True):
        if by_kernel:
            attention.use_on_cpu(model)
        found = [fed(model, [12], attention_mask=mask), fed(model, [12])]
        found[0][1, :5] = wanted[0][1, :5]  # of the padding, which nobody sees
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype: Any) -> None:
    """As near to what float32 finds as keys and values are."""
    model = made("minicpm3", dtype)
    exact = fed(copy.deepcopy(model).float(), [30, 1, 3]).double()
    theirs = (fed(model, [30, 1, 3]).double() - exact).abs().mean()
    attention.use_latents(model)
    attention.use_on_cpu(model)
    serve_plain_modules(model)
    ours = (fed(model, [30, 1, 3]).double() - exact).abs().mean()
    assert ours <= 1.2 * theirs


def test_others_attend_to_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own code, and a function that somebody has registered in the meantime."""
    eager = made("deepseek_v3")
    attention.use_latents(eager)
    eager.set_attn_implementation("eager")
    wanted = fed(made("deepseek_v3", attn_implementation="eager"), [10, 1])
    seen = Expansions(eager, monkeypatch)
    assert torch.equal(fed(eager, [10, 1]), wanted)
    assert seen.places == [10] * 4 + [11] * 4
    model = made("deepseek_v3")
    attention.use_latents(model)
    widths = []

    def theirs(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        widths.append((key.shape[3], value.shape[3]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    torch.testing.assert_close(fed(model, [10, 1]), wanted, atol=3e-4, rtol=1e-3)
    assert set(widths) == {(24, 24)}


def test_a_function_that_comes_when_layers_are_recorded_gets_keys_and_values(tmp_path: Path) -> None:
    engine = load(families.save("glm4_moe_lite", tmp_path), "ram")
    before = ask(engine, "a b c d e f g h").text
    assert "recorded layers" in engine.status()
    widths = []

    def theirs(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        widths.append((query.shape[2], key.shape[3], value.shape[3]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    assert ask(engine, "a b c d e f g h").text == before
    assert (1, 16, 16) in widths
    engine.close()


def test_what_somebody_has_put_on_the_matrix_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked what it makes, once there are so many latents that this is worth it."""
    model = made("youtu")
    layer = model.model.layers[1].self_attn.kv_b_proj
    layer.register_forward_hook(lambda _module, _args, out: out * 1.5)
    wanted = fed(model, [20, 1, 20, 1])
    attention.use_latents(model)
    attention.use_on_cpu(model)
    seen = Expansions(model, monkeypatch)
    torch.testing.assert_close(fed(model, [20, 1, 20, 1]), wanted, atol=3e-4, rtol=1e-3)
    assert seen.places == [20] * 4 + [21] + [41] * 4


def test_an_adapter_on_the_matrix() -> None:
    peft = pytest.importorskip("peft")
    model = made("youtu")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False))
    model.requires_grad_(False)
    wanted = fed(model, [40, 1, 2])
    attention.use_latents(model)
    assert latent_attention.hands_on(model.model.layers[0].self_attn)
    torch.testing.assert_close(fed(model, [40, 1, 2]), wanted, atol=3e-4, rtol=1e-3)


def test_copies_attend_by_weights_of_their_own() -> None:
    model = made("minicpm3")
    attention.use_latents(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.model.layers[0].self_attn.kv_b_proj.weight.mul_(2)
        plain = made("minicpm3")
        plain.model.layers[0].self_attn.kv_b_proj.weight.mul_(2)
        torch.testing.assert_close(fed(other, [9, 1]), fed(plain, [9, 1]), atol=3e-4, rtol=1e-3)


def test_gradients_are_those_of_keys_and_values() -> None:
    model = made("minicpm3")
    weight = model.model.layers[0].self_attn.kv_b_proj.weight.requires_grad_()
    fed(model, [9]).sum().backward()
    wanted, weight.grad = weight.grad, None
    attention.use_latents(model)
    attention.use_on_cpu(model)
    fed(model, [9]).sum().backward()
    torch.testing.assert_close(weight.grad, wanted, atol=1e-2, rtol=1e-2)


def test_modules_that_look_like_it_are_left_alone() -> None:
    eager = made("minicpm3", attn_implementation="eager").model.layers[0].self_attn
    assert not latent_attention.may_attend_to_latents(eager)
    model = made("minicpm3")
    module = model.model.layers[0].self_attn
    assert latent_attention.may_attend_to_latents(module)
    assert not latent_attention.may_attend_to_latents(model.model.layers[0].mlp)
    module.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(4 * 40))
    assert not latent_attention.may_attend_to_latents(module)
    same = made("minicpm3", kv_lora_rank=24, v_head_dim=8).model.layers[0].self_attn
    assert not latent_attention.may_attend_to_latents(same)


# ---------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (20, 1)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "places", "widths"), [(1, 1, (64, 16)), (3, 131, (24, 8)), (16, 300, (128, 64))]
)
def test_keys_in_two_parts(
    heads: tuple[int, int], tokens: int, places: int, widths: tuple[int, int], dtype: Any
) -> None:
    """Values are the first part."""
    pytest.importorskip("llvmlite")
    query, key, _ = states(heads, tokens, places, sum(widths), dtype)
    first, rest = (part.contiguous() for part in key.split(widths, -1))
    found = cpu_attention.attended(query, first, first, rest_of_key=rest)
    assert is_close(found, expected(query, key, first))
    assert torch.equal(found, cpu_attention.attended(query, key, first))


def test_parts_of_keys_that_do_not_fit() -> None:
    pytest.importorskip("llvmlite")
    query, key, _ = states((4, 1), 1, 20, 48)
    first, rest = (part.contiguous() for part in key.split((32, 16), -1))
    assert cpu_attention.attended(query, first, first, rest_of_key=rest) is not None
    assert cpu_attention.attended(query, first, first) is None
    assert cpu_attention.attended(query, first, first, rest_of_key=rest[..., :8]) is None
    assert cpu_attention.attended(query, first, first, rest_of_key=rest[:, :, 1:]) is None
    assert cpu_attention.attended(query, first, first, rest_of_key=rest.half()) is None
    assert cpu_attention.attended(query, first, first, rest_of_key=rest.to("meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("own", "values"), [(128, 128), (192, 256), (64, 72)])
def test_between_heads_and_latents(own: int, values: int, dtype: Any) -> None:
    torch.manual_seed(5)
    matrix, query = torch.randn(3, own + values, 64).to(dtype), torch.randn(2, 3, 5, own + 8).to(dtype)
    heads = latent_attention.Heads(latent_attention.plain_weights(matrix.flatten(0, 1)), own, values)
    exact = matrix.double()
    back = torch.einsum("bhtd,hdl->bhtl", query[..., :own].double(), exact[:, :own])
    found = heads.queries(query)
    rounding = 4 * torch.finfo(dtype).eps  # of sums of up to 192 numbers
    torch.testing.assert_close(found[..., :64].double(), back, atol=rounding * 60, rtol=rounding)
    assert torch.equal(found[..., 64:], query[..., own:])
    others = torch.float64 if dtype == torch.float32 else torch.float32
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        heads.queries(query[:1].to(others))
    seen = torch.randn(2, 5, 3, 64).to(dtype)
    there = torch.einsum("bthl,hvl->bthv", seen.double(), exact[:, own:])
    torch.testing.assert_close(heads.to_values(seen).double(), there, atol=rounding * 60, rtol=rounding)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "float8 in groups"])
def test_between_heads_and_packed_latents(kind: str, dtype: str) -> None:
    """Weights are read as they are packed, from both sides."""
    pytest.importorskip("llvmlite")
    own, values, latent = 24, 16, 256
    weights, exact = packed(kind, (3 * (own + values), latent), dtype)
    heads = latent_attention.Heads(weights, own, values)
    assert heads.kernels(getattr(torch, dtype), 5, 8) is not None
    exact = exact.view(3, own + values, latent)
    query = torch.randn(1, 3, 5, own + 8, generator=torch.Generator().manual_seed(4)).to(
        getattr(torch, dtype)
    )
    found = heads.queries(query)
    wanted = torch.einsum("bhtd,hdl->bhtl", query[..., :own].double(), exact[:, :own])
    rounding = max(4 * torch.finfo(query.dtype).eps, 3e-5)  # codes are looked up as three bytes of a float
    largest = float(wanted.abs().max())
    torch.testing.assert_close(found[..., :latent].double(), wanted, atol=rounding * largest, rtol=rounding)
    assert torch.equal(found[..., latent:], query[..., own:])
    seen = torch.randn(1, 5, 3, latent, generator=torch.Generator().manual_seed(6)).to(query.dtype)
    there = torch.einsum("bthl,hvl->bthv", seen.double(), exact[:, own:])
    largest = float(there.abs().max())
    torch.testing.assert_close(heads.to_values(seen).double(), there, atol=rounding * largest, rtol=rounding)


def test_fixed_places_have_both_parts_side_by_side() -> None:
    layer = static_cache.FixedLayer()
    latents, rotated = torch.randn(1, 1, 5, 32), torch.randn(1, 1, 5, 8)
    layer.allocate(latents, rotated, 2, 64)
    layer.put(latents, rotated, 5)
    layer.show(1, 16, torch.tensor(5), torch.tensor([5]))
    keys, rest = layer.update(latents[:, :, :1] + 1, rotated[:, :, :1] + 1)
    whole = latent_attention.whole_keys(keys, rest)
    assert whole.data_ptr() == keys.data_ptr()
    assert torch.equal(whole, torch.cat((keys, rest), -1))
    assert torch.equal(keys[:, :, :5], latents)
    assert torch.equal(rest[:, :, 5], rotated[:, :, 0] + 1)
    assert layer.keys.untyped_storage().nbytes() == sum(buffer.nbytes for buffer in layer.buffers)
    apart = latent_attention.whole_keys(latents, rotated)
    assert torch.equal(apart, torch.cat((latents, rotated), -1))


# ------------------------------------------------------------------------------------------- an engine


@pytest.mark.parametrize("method", ["", "nf4", "int8"])
def test_the_matrix_stays_in_numbers_and_layers_are_recorded(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan says of it, too."""
    folder = families.save("glm4_moe_lite", tmp_path)
    engine = load(folder, "ram", spec=ModelSpec(str(folder), quantize=method))
    matrices = [module.kv_b_proj for module in engine.model.modules() if hasattr(module, "expand_kv")]
    assert len(matrices) == 4
    assert all(
        type(each.weight) is torch.nn.Parameter and each.weight.is_floating_point() for each in matrices
    )
    packed = [type(layer.self_attn.o_proj.weight) for layer in engine.model.model.layers]
    assert all((kind is not torch.nn.Parameter) == bool(method) for kind in packed)
    seen = Expansions(engine.model, monkeypatch)
    ask(engine, request("a b c d e f g h i j k l m n o p q r s t u v w x y z", max_new_tokens=12))
    assert "recorded layers" in engine.status()
    assert len(set(seen.places)) <= 1  # those of the prompt
    blocks = sum(block.bytes for block in engine.plan.layout.layers)
    held = sum(p.nbytes for layer in engine.model.model.layers for p in layer.parameters())
    assert blocks >= held
    engine.close()


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("deepseek_v2")
    wanted = fed(model, [20, 1, 3])
    monkeypatch.setattr(cpu_attention, "is_there", lambda: False)
    monkeypatch.setattr(cpu_products, "_readers", lambda: None)
    cpu_attention._call.cache_clear()
    attention.use_latents(model)
    attention.use_on_cpu(model)
    seen = Expansions(model, monkeypatch)
    torch.testing.assert_close(fed(model, [20, 1, 3]), wanted, atol=3e-4, rtol=1e-3)
    assert seen.places == [20] * 4
    cpu_attention._call.cache_clear()
