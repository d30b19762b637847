"""The benchmarks' own code, on tiny models: contenders in turn, in processes of their own. No speed is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import __main__ as main
from benchmarks import cpu, gpu
from benchmarks.clock import Clock
from benchmarks.cpu import Setup
from benchmarks.models import SHAPES, Models, gguf_name, llama_as_gguf, placement, save_random, words
from benchmarks.peers import StockAccelerate
from benchmarks.protocol import Contender, Group, Series, once, run_group
from benchmarks.report import COPIED, DECODE, PER_SWEEP, Figure, Report
from benchmarks.worker import busy_processes

TOKENS = 6
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    save_random("Llama", TINY, folder)
    return str(folder)


def engine(name: str, folder: str, share: float, **case: Any) -> Contender:
    options = {"source": folder, "device_map": placement(folder, "cpu", "disk", share), "context": 128}
    return Contender(name, "engine", options, {"prompt": words(20, 300), "tokens": TOKENS, **case})


@pytest.mark.timeout(600)
def test_contenders_take_turns_and_answer_alike(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    stock = {"folder": tiny, "device_map": placement(tiny, "cpu", "disk", 0.5)}
    case = {"prompt": words(20, 300), "tokens": TOKENS}
    contenders = [
        engine("ours", tiny, 0.5),
        engine("ours, cold, with lookup", tiny, 0.5, cold=True, lookup=4),
        Contender("stock", "accelerate", stock, case),
        Contender("none such", "engine", {"source": f"{tiny}-not", "device_map": {}}),
    ]
    group = run_group("tiny", contenders, 2)
    good = [group.series[each.name] for each in contenders[:3]]
    assert [len(series.rounds) for series in good] == [2, 2, 2]
    assert [series.last("tokens") for series in good] == [TOKENS] * 3
    assert len({found["answer"] for series in good for found in series.rounds}) == 1
    assert good[0].last("ways")["mapped"] == 2
    assert good[1].last("load_s") == good[0].last("load_s")  # the same process
    assert all(math.isfinite(found["decode_tps"]) for series in good for found in series.rounds)
    assert group.series["none such"].error
    assert not group.series["none such"].rounds
    report = Report()
    report.add(group, "Tiny", [DECODE, PER_SWEEP], "stock", [["ours", "stock"]])
    shown = capsys.readouterr().out
    assert "the same tokens: ours, stock" in shown
    assert group.series["none such"].error in shown


def test_what_a_process_says_last_is_its_error() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        once("no such subject", {})


def test_programs_beside_a_case_end_with_it(tiny: str) -> None:
    def started() -> list[psutil.Process]:
        return psutil.Process().children()

    before = started()
    with busy_processes(2):
        assert len(started()) == len(before) + 2
    assert started() == before
    case = {"prompt": "w1 w2", "tokens": 2, "beside": 1}
    found = once("engine", {"source": tiny, "device_map": placement(tiny, "cpu")}, **case)
    assert found["tokens"] == 2


def test_the_disk_is_read_in_three_ways(tiny: str) -> None:
    found = once("disk", {"folder": tiny})
    assert len(found["rates"]) == 3
    assert found["bytes_per_s"] == max(found["rates"].values())


def test_a_share_of_the_layers_is_spread_evenly(tiny: str) -> None:
    for share, expected in ((0.0, []), (0.5, [1, 3]), (1.0, [0, 1, 2, 3])):
        found = placement(tiny, "cpu", "disk", share)
        assert [i for i in range(4) if found[f"model.layers.{i}"] == "disk"] == expected
        assert found["model.embed_tokens"] == found["lm_head"] == "cpu"


def test_medians_and_ratios() -> None:
    group = Group(
        "a",
        {
            "one": Series([{"decode_tps": 3.0}, {"decode_tps": 9.0}, {"decode_tps": 4.0}]),
            "two": Series([{"decode_tps": 1.0}, {"decode_tps": 2.0}, {"decode_tps": 2.0}]),
            "none": Series(error="broken"),
        },
    )
    assert group.median("one") == 4.0
    assert group.ratio("one", "two") == 2.0
    assert group.paired("one", "two", "decode_tps") == 3.0  # of 3, 4.5 and 2
    assert group.ratio("one", "none") is group.median("none") is group.paired("one", "none", "x") is None


def test_a_figure_is_met_or_missed_or_unknown() -> None:
    assert Figure("a", 0.9, 0.85).is_met
    assert Figure("a", 0.8, 0.85).is_met is False
    assert Figure("a", 1.5, 2.0, at_most=True).is_met
    assert Figure("a", None, 2.0).is_met is Figure("a", 1.0).is_met is None


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "found.json"
    report = Report(figures=[Figure("f", 1.0, 2.0)], path=path)
    report.skip("something")
    report.print_figures()
    report.keep(Group("a", {"one": Series([{"seconds": 1.0}])}))
    found = json.loads(path.read_text())
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert found["groups"][0]["series"]["one"]["rounds"] == [{"seconds": 1.0}]
    assert found["figures"][0]["is_met"] is False
    assert found["skipped"] == ["something"]
    shown = capsys.readouterr().out
    assert "missed" in shown
    assert "Left out: something" in shown


def test_a_group_is_kept_after_every_answer_and_counted_once(tiny: str, tmp_path: Path) -> None:
    report, seen = Report(path=tmp_path / "found.json"), []

    def keep(group: Group) -> None:
        report.keep(group)
        written = json.loads((tmp_path / "found.json").read_text())
        seen.append(
            [len(series["rounds"]) for each in written["groups"] for series in each["series"].values()]
        )

    contenders = [Contender(name, "disk", {"folder": tiny}) for name in ("one", "two")]
    run_group("disk", contenders, 1, keep=keep)
    assert seen == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_who_gives_no_answer_in_time_is_ended() -> None:
    with pytest.raises(RuntimeError, match="no answer in 0 s"):
        once("cpu", {}, timeout_s=0.0)


def test_one_group_that_breaks_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_setup: Setup) -> None:
        raise KeyError("nowhere")

    monkeypatch.setitem(main.GROUPS, "moves", broken)
    setup = Setup(Report(), tmp_path, 1, 8)
    main.run("moves", setup, "")
    main.run("resident", setup, "")
    assert setup.report.broken == ["moves (KeyError: 'nowhere')"]
    assert setup.report.skipped == ["resident (no CUDA device)"]
    assert "Given up: moves" in capsys.readouterr().out


def test_where_there_is_a_gpu_its_groups_come_first() -> None:
    assert main.all_groups("") == [*cpu.GROUPS]
    assert main.all_groups("H100") == [*gpu.GROUPS, *cpu.GROUPS]


def test_a_model_that_was_made_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-1b", ("Llama", TINY))
    made = [Models().measure("llama-1b", str(tmp_path))["path"]]
    file = Path(made[0]) / "model.safetensors"
    before = file.stat()
    made.append(Models().measure("llama-1b", str(tmp_path))["path"])
    assert made[0] == made[1]
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_an_engine_needs_no_packages_but_those_it_computes_with(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has torch, transformers, accelerate and pytest alone."""
    for name in (
        "platformdirs",
        "IPython",
        "ipywidgets",
        "anywidget",
        "nh3",
        "markdown_it",
        "msgspec",
        "gguf",
    ):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.protocol.CACHE", tmp_path / "cache")
    monkeypatch.delenv("LLM_MAGIC_CACHE")
    each = engine("ours", tiny, 0.0)
    group = run_group("alone", [each], 1)
    assert group.series["ours"].error == ""
    assert group.series["ours"].last("tokens") == TOKENS
    assert (tmp_path / "cache" / "machine.json").is_file()


def test_the_clock_of_stock_runs_from_the_text_on(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = StockAccelerate(tiny, placement(tiny, "cpu"))
    tokenizer, now = subject._tokenizer, [0.0]

    class SlowTokenizer:
        decode = tokenizer.decode

        def __call__(self, text: str, **how: Any) -> Any:
            now[0] += 5.0
            return tokenizer(text, **how)

    subject._tokenizer = SlowTokenizer()
    monkeypatch.setattr("benchmarks.clock.time.perf_counter", lambda: now[0])
    assert subject.measure(words(20, 300), 3)["first_token_s"] == 5.0
    subject.close()


def test_time_spent_on_dropping_pages_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]

    def drop(_path: Path) -> None:
        now[0] += 100.0

    monkeypatch.setattr("benchmarks.clock.drop_pages", drop)
    monkeypatch.setattr("benchmarks.clock.time.perf_counter", lambda: now[0])
    clock = Clock([tmp_path])
    for step_s in (2.0, 0.5, 0.5):
        now[0] += step_s
        clock.tick()
    assert clock.rates(10) == {"first_token_s": 2.0, "prefill_tps": 5.0, "tokens": 3, "decode_tps": 2.0}


def test_names_for_llama_cpp() -> None:
    assert gguf_name("model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"


def test_answers_are_the_same_as_far_as_the_shorter_goes(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"long": "w1 w2 w3", "short": "w1 w2", "other": "w1 w4", "none": None}
    series = {name: Series([{"answer": text}] if text else []) for name, text in answers.items()}
    pairs = [["long", "short"], ["short", "other"], ["long", "none"]]
    Report().add(Group("a", series), "A", [DECODE], same_answers=pairs)
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "tokens:" in line]
    assert said == ["the same tokens: long, short", "not the same tokens: short, other"]


def test_groups_have_one_line_that_says_what_they_are() -> None:
    assert not set(cpu.GROUPS) & set(gpu.GROUPS)
    assert all(group.__doc__ for group in (*cpu.GROUPS.values(), *gpu.GROUPS.values()))
    assert COPIED.shown(2**20) == "1.0 MiB"


def test_a_session_is_asked_through_each_screen_and_moves_blocks(tiny: str) -> None:
    asked = {"prompt": words(20, 300), "tokens": TOKENS}
    maps = {"there": placement(tiny, "cpu", "disk", 0.5), "back": placement(tiny, "cpu")}
    contenders = [
        Contender(case, "session", {"source": tiny}, {"case": case, **asked})
        for case in ("bare", "text", "notebook")
    ]
    contenders += [
        Contender(name, "session", {"source": tiny}, {"case": "move", "device_map": device_map})
        for name, device_map in maps.items()
    ]
    group = run_group("session", contenders, 1)
    assert {name: series.error for name, series in group.series.items() if series.error} == {}
    assert all(group.median(case, "total_s") for case in ("bare", "text", "notebook"))
    assert [group.median(name, "blocks") for name in maps] == [2, 2]


def test_a_random_llama_is_written_for_llama_cpp(tiny: str, tmp_path: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    llama_as_gguf(Path(tiny), tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    weights = load_file(Path(tiny) / "model.safetensors")
    assert {tensor.name for tensor in reader.tensors} == {gguf_name(name) for name in weights}
    query = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
    expected = weights["model.layers.1.self_attn.q_proj.weight"].view(torch.uint8).numpy()
    assert query.data.tobytes() == expected.tobytes()
    assert list(query.shape) == [64, 64]


@dataclass(frozen=True)
class Told(Setup):
    """A setup that measures nothing: what every contender "gave" is told."""

    model: str = ""
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def run(self, name: str, contenders: list[Contender], repeats: int | None = None) -> Group:
        return Group(name, {each.name: Series([dict(self.told.get(each.name, {}))]) for each in contenders})

    def made(self, what: str, **changes: object) -> str:
        return self.model


def test_figures_of_streaming_are_held_against_the_bus(tiny: str, tmp_path: Path) -> None:
    told = {
        "the bus, pinned": {"bus_bytes_per_s": 50e9},
        "llm_magic, streamed": {"decode_tps": 6.0, "moved_bytes": 8e9},  # the bus allows 6.25
        "llm_magic, hybrid": {"decode_tps": 10.0, "moved_bytes": 5e9},
        "llm_magic, hybrid and prompt lookup": {"decode_tps": 20.0},
        "stock Accelerate": {"decode_tps": 0.5},
    }
    setup = Told(Report(), tmp_path, 1, 8, model=tiny, told=told)
    gpu.half(setup)
    found = {figure.what: figure for figure in setup.report.figures}
    assert found["GPU, half in RAM, streamed: of the bus limit"].reached == pytest.approx(0.96)
    assert found["GPU, half in RAM, streamed: of the bus limit"].is_met is False
    assert found["GPU, half in RAM, streamed: times stock"].reached == pytest.approx(12.0)
    assert found["GPU, half in RAM, hybrid: of the bus limit"].reached == pytest.approx(1.6)
    assert found["GPU, half in RAM: decode, of llama.cpp"].reached is None


@pytest.mark.parametrize("group", [*cpu.GROUPS, *gpu.GROUPS])
def test_a_group_without_numbers_is_shown_all_the_same(group: str, tiny: str, tmp_path: Path) -> None:
    setup = Told(Report(), tmp_path, 1, 8, large=True, model=tiny)
    {**cpu.GROUPS, **gpu.GROUPS}[group](setup)
    assert setup.report.groups or setup.report.skipped
    assert all(figure.reached is None for figure in setup.report.figures)
