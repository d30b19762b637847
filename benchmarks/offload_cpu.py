"""What offloading to disk costs on this computer: `make bench`, or `python benchmarks/offload_cpu.py`.

Protocol. The starter model (SmolLM2-135M-Instruct) runs on the CPU with all of its decoder layers in
RAM, with the second half of them on disk, and with all of them on disk. Libraries are imported and the
model is converted before anything is measured. Each placement is loaded once and answers the same
prompt greedily: one answer to warm up, then ``--repeats`` that count; the median is shown. The
operating system may keep the weights of this small model in its page cache, so what "disk" measures
here is the overhead of moving layers more than the speed of the disk. Placements must give the same
tokens, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from llm_magic.model import ModelSpec
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.plan import Plan
from llm_magic.session import Session
from llm_magic.units import format_rate, format_seconds

STARTER = ModelSpec("starter")
PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
PLACEMENTS = {"all layers in RAM": 0.0, "half of the layers on disk": 0.5, "all layers on disk": 1.0}


@dataclass(frozen=True)
class Measured:
    """One placement: load time, and the medians of its answers."""

    placement: str
    load_s: float
    prefill_tps: float
    decode_tps: float
    decode_tps_low: float
    decode_tps_high: float
    forecast_decode_tps: float


def main() -> int:
    """Measure every placement, print a table, write the numbers."""
    arguments = parse_arguments()
    session = Session()
    session.load(STARTER, LoadOptions(), "warm-up")
    whole = session.plan(STARTER, LoadOptions())
    session.unload("warm-up")
    measured, texts = [], set()
    for name, share in PLACEMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "map.json"
            file.write_text(json.dumps(device_map(whole, share)))
            result, text = measure(session, name, file, arguments)
        measured.append(result)
        texts.add(text)
    print_table(measured)
    write_json(measured, arguments)
    if len(texts) > 1:
        print("The placements did not give the same tokens.", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What offloading to disk costs on this computer.")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer (64)")
    parser.add_argument("--repeats", type=int, default=3, help="answers that count (3)")
    parser.add_argument("--json", type=Path, default=Path("build/offload_cpu.json"), help="where numbers go")
    return parser.parse_args()


def device_map(plan: Plan, disk_share: float) -> dict[str, str]:
    """Every block in RAM but the last ``disk_share`` of the layers."""
    layers = [block.name for block in plan.layout.layers]
    on_disk = set(layers[len(layers) - round(len(layers) * disk_share) :])
    return {block.name: "disk" if block.name in on_disk else "cpu" for block in plan.layout.blocks}


def measure(
    session: Session, name: str, map_file: Path, arguments: argparse.Namespace
) -> tuple[Measured, str]:
    """Load one placement, answer, unload; the answer's text comes along."""
    model = session.load(STARTER, LoadOptions(device_map=str(map_file)), "bench")
    sampling = {"temperature": 0.0, "max_new_tokens": arguments.tokens}
    options = AskOptions(history=False, sampling=sampling)
    answers = [session.ask(PROMPT, options) for _ in range(1 + arguments.repeats)]
    footprints = [answer.footprint for answer in answers[1:]]
    session.unload("bench")
    decode = [footprint.generation_tps for footprint in footprints]
    return (
        Measured(
            name,
            model.load_s,
            statistics.median(footprint.prompt_tps for footprint in footprints),
            statistics.median(decode),
            min(decode),
            max(decode),
            model.plan.forecast.decode_tps,
        ),
        answers[-1].text,
    )


def print_table(measured: list[Measured]) -> None:
    print(f"{'SmolLM2-135M-Instruct':28}{'load':>9}{'prefill':>14}{'decode':>14}{'forecast':>14}")
    for row in measured:
        print(
            f"{row.placement:28}{format_seconds(row.load_s):>9}{format_rate(row.prefill_tps):>14}"
            f"{format_rate(row.decode_tps):>14}{format_rate(row.forecast_decode_tps):>14}"
        )


def write_json(measured: list[Measured], arguments: argparse.Namespace) -> None:
    record = {
        "benchmark": "offload_cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "llm-magic")},
        "new_tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "placements": [asdict(row) for row in measured],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {arguments.json}")


if __name__ == "__main__":
    sys.exit(main())
