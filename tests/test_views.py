"""What plans and maps say: golden text, HTML that is safe anywhere, Python that runs."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.placing import changes_in_words
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.units import GIB, MIB, format_bytes
from llm_magic.views import theme
from llm_magic.views.map import map_report, placement_bar, placement_words, processor_words
from llm_magic.views.plan import plan_report
from llm_magic.views.python import python_of
from llm_magic.views.report import Report
from llm_magic.views.words import percents, ranges
from tests.layouts import (
    disk,
    eight_gpus,
    four_gpus,
    gpu,
    h100,
    laptop,
    llama,
    llama8b,
    llama405b,
    mac,
    machine,
    moe30b,
    packed,
    qwen32b,
    ram,
    starter,
    tensor,
    workstation,
)

POLICY = {planner.name: planner for planner in POLICIES}


def plan_for(
    layout: ModelLayout,
    box: Machine,
    policy: str = "auto",
    *,
    context: int = 8192,
    source: str = "",
    **limits: int,
) -> Plan:
    return make_plan(
        layout,
        box,
        Workload(context),
        placement=POLICY[policy],
        policy=policy,
        max_memory=limits,
        source=source,
    )


def half_on_disk() -> Plan:
    return plan_for(starter(), laptop(), context=2048, source="org/starter", cpu=190 * MIB)


def on_h100(layout: ModelLayout) -> Plan:
    """Every second layer in RAM, the last one on disk with a copy kept."""
    map_ = {"": "cuda:0"} | {f"layers.{i}": "cpu" for i in range(0, 32, 2)} | {"layers.31": "disk"}
    return make_plan(layout, h100(), Workload(4096), placement=map_, policy="half.json")


def looked_up(layout: ModelLayout, home: str, **others: str) -> Plan:
    """The table in RAM or on disk, everything else on the GPU."""
    map_ = {"": "cuda:0", "embed": home} | others
    return make_plan(layout, h100(), Workload(4096), placement=map_, policy="table.json")


def two_tables() -> ModelLayout:
    """Rows for the layers as well, as in Gemma 3n."""
    embed, *others = llama8b().blocks
    beside = "model.embed_tokens_per_layer"
    block = Block(beside, "embed_per_layer", "embedding", (tensor(f"{beside}.weight", MIB),), looks_up=True)
    return replace(llama8b(), blocks=(embed, block, *others))


PLANS = {
    "half on disk": half_on_disk,
    "one GPU": lambda: plan_for(qwen32b(), workstation()),
    "four GPUs": lambda: plan_for(qwen32b(), four_gpus(), "balanced"),
    "405B": lambda: plan_for(llama405b(), eight_gpus()),
    "unified": lambda: plan_for(qwen32b(), mac()),
    "experts": lambda: plan_for(moe30b(), workstation()),
    "hybrid": lambda: on_h100(llama8b()),
    "packed": lambda: on_h100(packed(llama8b())),
    "draft": lambda: on_h100(replace(llama8b(), draft=llama())),
    "table in RAM": lambda: looked_up(llama8b(), "cpu"),
    "table on disk": lambda: looked_up(llama8b(), "disk"),
    "tables apart": lambda: looked_up(two_tables(), "disk", embed_per_layer="cpu"),
    "does not fit": lambda: plan_for(qwen32b(), workstation(), "cpu"),
}


# --- Golden text

PLAN_TEXT = """\
SmolLM2-135M-Instruct  bfloat16 · 256.6 MiB · 30 layers · context 2,048
✓ fits, 5.3 MiB to spare in RAM · placed by auto: 50 % RAM · 50 % disk

        weights  KV cache  activations    planned         of    spare
RAM   128.3 MiB  45.0 MiB     11.4 MiB  184.7 MiB  190.0 MiB  5.3 MiB
Disk  128.3 MiB         –            –  128.3 MiB          –        –

forecast   decode 42.0 tok/s · prefill 374 tok/s · bound by RAM, 20.0 GB/s · the
           hardware's limit is 71.2 tok/s
each token 267.8 MiB read by the CPU
model      135 M parameters · size class <1B · made for 8,192 tokens · no chat
           template

! No GPU was found: the CPU computes.
! 19 blocks of 128.3 MiB on disk, read once at 800 MB/s: the system's page cache
  has room for them, as long as other programs leave it.

The same with plain transformers:
    from transformers import AutoModelForCausalLM

    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" for i in range(30)}
    device_map |= {f"model.layers.{i}": "cpu" for i in [1, 4, 6, 9, 12, 14, 17, 20, 23, 25, 28]}
    model = AutoModelForCausalLM.from_pretrained(
        "org/starter",
        dtype="bfloat16",
        device_map=device_map,
        offload_folder="offload",
    )"""


def test_plan_text():
    assert plan_report(half_on_disk()).text == PLAN_TEXT


MAP_TEXT = """\
Qwen3-32B  bfloat16 · 61.0 GiB · 64 layers · context 8,192
✓ fits, 26.0 MiB to spare in RAM · forecast 0.61 tok/s · bound by bus to cuda:0,
  25.1 GB/s

cuda:0  [███████████████░░▓▓-/]                                      21.6 GiB
        452.1 MiB spare · now 19.0 GiB · RTX 4090 · 24.0 GiB
     ↑  30.0 GiB to cuda:0 for every token · link 25.1 GB/s
RAM     [███████████████████████████████░░--/////////////////////]   37.6 GiB
        26.0 MiB spare · DDR5 · 64.0 GiB
     ↑  7.3 GiB to cuda:0 for every token · link 6.8 GB/s
Disk    [████████ …                                                  8.7 GiB
        read from its files · NVMe SSD · 1000.0 GiB, 412.0 GiB free

blocks in model order: 0 cuda:0; R RAM, streamed; C RAM, by the CPU; L Disk,
  looked up; D Disk
  LR0RDR0CRR0RDR0RC0RRD0RRR0RCD0RR0R
  RR0DCR0RRR0DRR0CR0RDR0RRC0RDR0R00
  cuda:0: layers.1, 5, 9, 13, 16, 20, 24, 28, 31, 35, 39, 43, 47, 50, 54, 58,
    62, norm, head
  RAM, streamed: layers.0, 2, 4, 7–8, 10, 12, 14, 17–18, 21–23, 25, 29–30,
    32–34, 38, 40–42, 45–46, 49, 51, 53, 55–56, 59, 61, 63
  RAM, by the CPU: layers.6, 15, 26, 37, 48, 57
  Disk, looked up: embed
  Disk: layers.3, 11, 19, 27, 36, 44, 52, 60

█ weights   ░ slots   ▓ KV cache   ▒ activations   · free   - kept in reserve
/ other programs"""


def test_map_text():
    report = map_report(PLANS["one GPU"](), {"cuda:0": {"weights": 18 * GIB, "kv_cache": GIB}})
    assert "\n".join(line.rstrip() for line in report.text.splitlines()) == MAP_TEXT


def test_a_plan_says_which_prompts_the_gpu_reads():
    plan = PLANS["hybrid"]()
    assert plan.long_sweep > 1
    line = f"prompts    of {plan.long_sweep} tokens or more: the CPU's blocks stream to cuda:0 too"
    report = plan_report(plan)
    assert line in report.text
    assert "stream to cuda:0 too" in report.html
    assert "prompts    of" not in plan_report(half_on_disk()).text


def test_words_and_bars():
    plan = PLANS["one GPU"]()
    words = "28 % GPU · 2 % looked up · 49 % RAM streamed · 9 % RAM on the CPU · 12 % disk"
    assert placement_words(plan) == words
    assert processor_words(plan) == "12%/58%/30% disk/CPU/GPU"
    text, html = placement_bar(plan)
    assert text == f"[█████▄▓▓▓▓▓▓▓▓▓▓▓▒░░] {words}"
    assert "28 % GPU" in html
    assert placement_words(half_on_disk()) == "50 % RAM · 50 % disk"
    text, _ = placement_bar(PLANS["hybrid"]())
    words = "54 % GPU · 24 % RAM streamed · 19 % RAM on the CPU · 3 % disk kept in RAM"
    assert text == f"[████████████▓▓▓▓▒▒▒■] {words}"
    assert processor_words(PLANS["four GPUs"]()) == "100% GPU"


def test_a_map_tells_what_happens_to_each_block():
    lines = map_report(PLANS["hybrid"]()).text.splitlines()
    assert "  0R0C0R0C0R0R0C0R0C0R0C0R0R0C0R0CK00" in lines
    assert "  RAM, by the CPU: layers.2, 6, 12, 16, 20, 26, 30" in lines
    assert "  Disk, kept in RAM: layers.31" in lines


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("table in RAM", "L RAM, looked up"),
        ("table on disk", "L Disk, looked up"),
        ("tables apart", "L RAM and disk, looked up"),
    ],
)
def test_a_map_tells_where_rows_are_looked_up(name, words):
    text = map_report(PLANS[name]()).text
    assert f"blocks in model order: 0 cuda:0; {words}\n" in text
    assert "RAM, streamed" not in text


def test_what_is_looked_up_is_neither_streamed_nor_read():
    in_ram, on_disk = map_report(PLANS["table in RAM"]()), map_report(PLANS["table on disk"]())
    # 1,050,673,152 of 16,061,120,640 bytes
    assert "93 % GPU · 7 % looked up" in in_ram.html
    assert "rows are looked up where they are" in in_ram.html
    assert "to cuda:0 for every token" not in in_ram.text
    assert "looked up in its files" in on_disk.text
    assert "read from its files" in map_report(looked_up(llama8b(), "disk", **{"layers.0": "disk"})).text


def test_without_a_gpu_the_cpu_looks_rows_up_on_the_disk():
    map_ = {"": "cpu", "embed": "disk"}
    plan = make_plan(llama(), laptop(), Workload(64), placement=map_, policy="table.json")
    report = map_report(plan)
    # 40 of 480 MiB
    assert placement_words(plan) == "8 % looked up · 92 % RAM"
    assert "on disk, rows are looked up for the CPU" in report.html
    assert "looked up in its files" in report.text


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_move_says_for_whom_rows_are_looked_up_now(home):
    on_gpu, on_cpu = looked_up(llama(), home), looked_up(llama(), home, **{"": "cpu"})
    assert "embed (40.0 MiB) looked up for cuda:0 now" in changes_in_words(on_cpu, on_gpu)
    back = "looked up for the CPU now" if home == "disk" else "computed by the CPU now"
    assert f"embed (40.0 MiB) {back}" in changes_in_words(on_gpu, on_cpu)


def test_a_table_that_is_too_wide_is_turned():
    text = plan_report(PLANS["draft"]()).text
    assert re.search(r"\n {16}cuda:0 +RAM +Disk\n", text)
    assert re.search(r"\ndraft +\d+\.\d MiB +– +–\n", text)
    assert re.search(r"\nkept +– +416\.0 MiB +–\n", text)


def test_packed_weights_are_named():
    assert "nf4 in bfloat16 · 5.6 GiB" in plan_report(PLANS["packed"]()).text


@pytest.mark.parametrize("name", PLANS)
def test_text_says_the_verdict_and_every_reason(name):
    plan = PLANS[name]()
    for report in (plan_report(plan), map_report(plan)):
        assert ("✓ fits" in report.text) == plan.fits
        words = " ".join(report.text.split())
        assert all(problem in words for problem in plan.problems)
        assert plan.fits or plan.remedies[0] in words


@pytest.mark.parametrize("name", PLANS)
def test_text_fits_a_terminal_of_80_columns(name):
    plan = PLANS[name]()
    prose = plan_report(plan).text.split("The same with plain transformers")[0]
    for line in (*prose.splitlines(), *map_report(plan).text.splitlines()):
        assert len(line) <= 80, line


def test_unknown_speed_is_called_unknown():
    plan = plan_for(qwen32b(), machine(gpu(0, 80 * GIB, read=0), ram(64 * GIB)))
    assert "forecast   decode unknown · prefill unknown\n" in plan_report(plan).text
    assert "forecast unknown" in map_report(plan).text


@given(st.dictionaries(st.sampled_from(["gpu", "cpu", "disk"]), st.integers(1, 10**12)))
def test_percents_add_up(sizes):
    shares = percents(sizes)
    assert sum(shares.values()) == (100 if sizes else 0)
    assert all(share >= 1 for share in shares.values())


def test_ranges():
    assert ranges([5, 0, 1, 2]) == "0–2, 5"
    assert ranges([]) == ""


# --- HTML


class Page(HTMLParser):
    """Elements, their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


def htmls(plan: Plan) -> list[str]:
    return [plan_report(plan).html, map_report(plan, {"cpu": {"weights": 1}}).html, placement_bar(plan)[1]]


@pytest.mark.parametrize("name", PLANS)
def test_html_is_static_and_stands_alone(name):
    for html in htmls(PLANS[name]()):
        page = Page(html)
        assert page.open == []
        assert {tag for tag, _ in page.tags} <= {
            *("div", "span", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre")
        }
        assert {key for _, attributes in page.tags for key in attributes} <= {"style", "title"}
        assert not re.search(r"url\(|https?:|javascript|expression\(|@import", html, re.IGNORECASE)


def test_hostile_names_stay_text():
    evil = "<img src=x onerror=alert(1)>\"'&{}"
    layout = replace(llama(), name=evil)
    first = replace(layout.blocks[0], label=evil)
    layout = replace(layout, blocks=(first, *layout.blocks[1:]), dtype="bfloat16")
    box = machine(replace(gpu(0, 24 * GIB), name=evil), replace(ram(64 * GIB), name=evil))
    plan = plan_for(layout, box, source=evil)
    for html in htmls(plan):
        assert "<img" not in html
        assert all(tag != "img" for tag, _ in Page(html).tags)
    assert evil in Page(map_report(plan).html).shown


DOES = {
    "resident": "computes there",
    "streamed": "in RAM, streams to cuda:0",
    "cpu": "in RAM, computed by the CPU",
    "read": "on disk, ",
    "kept": "on disk, a copy stays in RAM",
    "looked-up": ", rows are looked up for cuda:0",
}


@pytest.mark.parametrize("name", ["one GPU", "half on disk", "experts", "hybrid", "tables apart"])
def test_every_block_is_in_the_map_with_a_tooltip(name):
    plan = PLANS[name]()
    titles = [a["title"] or "" for _, a in Page(map_report(plan).html).tags if "title" in a]
    for place in plan.placements:
        mine = [title for title in titles if title.startswith(f"{place.block.label} · ")]
        # once in its tier, when it has bytes there, and once in the strip
        assert len(mine) == 1 + bool(place.block.bytes), place.block.label
        where = {"cpu": "in RAM", "disk": "on disk"}.get(place.home, f"on {place.home}")
        assert where in mine[0]
        assert DOES[place.way] in mine[0]


def test_bars_are_at_one_true_scale():
    plan = PLANS["one GPU"]()
    html = map_report(plan).html
    widths = [float(w) for w in re.findall(r"flex-shrink:0;width:([\d.]+)%;height:40px", html)]
    # 24 GiB of VRAM and 9.1 GiB on disk beside 64 GiB of RAM
    disk_bytes = plan.use("disk").planned
    assert widths == pytest.approx([100 * 24 / 64, 100, 100 * disk_bytes / (64 * GIB)], abs=0.01)


def test_segments_of_a_whole_device_fill_its_bar():
    html = map_report(PLANS["four GPUs"]()).html
    bars = html.split("height:40px")[1:]
    for bar in bars:
        inside = bar.split("</div>")[0]
        shares = [float(w) for w in re.findall(r"display:block;flex-shrink:0;width:([\d.]+)%", inside)]
        assert sum(shares) == pytest.approx(100, abs=0.1)


def test_an_overfull_device_shows_where_it_ends():
    html = map_report(PLANS["does not fit"]()).html
    assert 'title="RAM ends here: 64.0 GiB"' in html
    assert "lacks 25.6 GiB" in html


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    "name",
    [
        *("gpu", "ram", "ram-streamed", "looked-up", "disk", "kept", "draft"),
        *("kv_cache", "activations", "slots", "buffers"),
    ],
)
def test_one_palette_serves_light_and_dark(name):
    colour = re.findall(r"background-color:(#\w{6})", theme.fill(name))[0]
    assert contrast(colour, "#ffffff") >= 4.4  # the white label inside
    assert contrast(colour, "#111111") >= 3


def test_travelling_and_resident_blocks_differ_without_colour():
    fills = [theme.fill(name) for name in ("gpu", "ram-streamed", "looked-up", "disk", "kept", "kv_cache")]
    patterns = [re.findall(r"background-image:([^;]*)", fill) for fill in fills]
    assert len({str(pattern) for pattern in patterns}) == len(patterns)


def test_report_shows_text_where_there_is_no_html():
    report = Report("words")
    assert report._repr_mimebundle_() == {"text/plain": "words"}
    assert repr(report) == str(report) == "words"
    assert Report("words", "<b>words</b>")._repr_mimebundle_()["text/html"] == "<b>words</b>"


# --- Python


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


@pytest.mark.parametrize("name", PLANS)
def test_the_snippets_map_is_the_plans(name):
    plan = PLANS[name]()
    code = re.sub("^from transformers.*", "", python_of(plan).split("\nmodel = ")[0], flags=re.MULTILINE)
    found = run(code)["device_map"]
    gpus = {f"cuda:{i}": i for i in range(8)}
    expected = {block: gpus.get(home, home) for block, home in plan.device_map.items()}
    assert found == expected or found == {"": next(iter(expected.values()))}


def test_absolute_paths_stay_out_of_the_snippet(tmp_path, monkeypatch):
    (tmp_path / "home" / "models").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    plan = plan_for(llama(), laptop(), source=str(tmp_path / "home" / "models"))
    assert '    Path("~/models").expanduser(),' in python_of(plan)
    assert str(tmp_path) not in plan_report(plan).text + plan_report(plan).html


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("map_", [{"": "cpu"}, {"": "cpu", "layers.1": "disk", "layers.2": "disk"}])
def test_the_snippet_runs_and_answers_like_the_plain_model(tmp_path, monkeypatch, tied, map_):
    import torch
    from transformers import AutoModelForCausalLM

    from llm_magic.model import ModelSpec
    from tests.engines import BACKEND
    from tests.tiny import save_llama

    monkeypatch.chdir(tmp_path)
    folder = save_llama(Path("tiny"), tied=tied)
    layout = BACKEND.layout(ModelSpec(str(folder)), lambda _event: None)
    plan = make_plan(layout, laptop(), Workload(64), placement=map_, policy="map.json", source="tiny")
    model = run(python_of(plan))["model"]
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        found = model(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=layout.dtype)(tokens).logits
    assert torch.equal(found, plain)
    homes = {name: str(home) for name, home in getattr(model, "hf_device_map", {"": "cpu"}).items()}
    assert ("disk" in homes.values()) == ("disk" in plan.device_map.values())


@pytest.mark.parametrize(
    ("method", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt"), ("quanto-int8", "QLinear")]
)
def test_the_snippet_packs_the_weights(tmp_path, monkeypatch, method, kind):
    from llm_magic.model import ModelSpec
    from tests.engines import BACKEND
    from tests.tiny import save_llama

    monkeypatch.chdir(tmp_path)
    folder = save_llama(Path("tiny"))
    layout = replace(BACKEND.layout(ModelSpec(str(folder)), lambda _event: None), quantization=method)
    plan = make_plan(layout, laptop(), Workload(64), placement={"": "cpu"}, policy="cpu", source="tiny")
    model = run(python_of(plan))["model"]
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == kind


def test_the_snippet_says_what_accelerate_does_otherwise():
    assert "here the CPU computes some of them" in python_of(PLANS["hybrid"]())
    assert "refuses to offload packed weights" in python_of(PLANS["packed"]())
    assert "a whole table to a GPU for every token" in python_of(PLANS["table in RAM"]())
    assert "a whole table to a GPU for every token" in python_of(PLANS["table on disk"]())
    table_of_packed = looked_up(packed(llama8b()), "cpu")
    assert "refuses to offload packed weights" in python_of(table_of_packed)
    assert "#" not in python_of(half_on_disk())


def test_what_a_move_changes_is_said_as_it_is() -> None:
    """Not that a block is read in every sweep which is in the page cache, nor that one is kept that was before."""
    layout = llama8b()
    on = machine(gpu(0, 8 * GIB), gpu(1, 8 * GIB), ram(64 * GIB), disk(900 * GIB))
    alone = machine(ram(64 * GIB), disk(900 * GIB))
    in_ram = make_plan(layout, alone, Workload(2048), placement={"": "cpu"}, policy="hand")
    place = next(place for place in in_ram.placements if place.block.label == "layers.2")
    kept = [replace(place, home="disk", kept=True, compute=device) for device in ("cuda:0", "cuda:1")]
    plans = [
        replace(in_ram, machine=on, placements=tuple(new if p is place else p for p in in_ram.placements))
        for new in kept
    ]
    assert changes_in_words(*plans) == [
        f"{place.block.label} ({format_bytes(place.block.bytes)}) computed by cuda:1 now"
    ]
    read = [replace(place, home="disk", compute=device) for device in ("cuda:0", "cpu")]
    plans = [
        replace(in_ram, mapped=True, placements=tuple(new if p is place else p for p in in_ram.placements))
        for new in read
    ]
    assert changes_in_words(*plans) == [
        f"{place.block.label} ({format_bytes(place.block.bytes)}) used in the page cache now"
    ]
