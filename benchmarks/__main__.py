"""`python -m benchmarks`: run groups, print tables, write JSON."""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks import cpu, gpu
from benchmarks.cpu import Setup
from benchmarks.protocol import TIMEOUT_S
from benchmarks.report import Report, print_header

GROUPS = {**cpu.GROUPS, **gpu.GROUPS}


def main() -> int:
    """Run what was asked for; 1 when something of ours failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file, too: whoever ends the run has what it said
    arguments = parse_arguments()
    if arguments.list:
        for name, group in GROUPS.items():
            print(f"{name:14}{(group.__doc__ or '').splitlines()[0]}")
        return 0
    device = gpu.device_name()
    print_header(arguments.repeats, device)
    report = Report(facts={"gpu": device, "arguments": sys.argv[1:]}, path=arguments.json)
    kept = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory("-llm-magic")
    with kept as folder:
        setup = Setup(
            report, Path(folder), arguments.repeats, arguments.tokens, arguments.large, arguments.timeout
        )
        try:
            for name in arguments.only or all_groups(device):
                run(name, setup, device)
        except KeyboardInterrupt:
            print("\nInterrupted.")
        report.print_figures()
    report.write()
    print(f"\nWritten to {arguments.json}")
    return int(bool(report.broken or failed(report)))


def all_groups(device: str) -> Sequence[str]:
    """What is run unasked: first what needs the GPU, if there is one."""
    return [*(gpu.GROUPS if device else ()), *cpu.GROUPS]


def run(name: str, setup: Setup, device: str) -> None:
    """One group; whatever is wrong with it, with its model for one, is no reason to leave out others."""
    if name in gpu.GROUPS and not device:
        setup.report.skip(f"{name} (no CUDA device)")
        return
    try:
        GROUPS[name](setup)
    except Exception as error:
        setup.report.give_up(f"{name} ({type(error).__name__}: {error})")


def failed(report: Report) -> list[str]:
    """Contenders of our own that did not work; peers may."""
    peers = ("stock", "llama.cpp", "diffusers", "AirLLM")
    return [
        name
        for group in report.groups
        for name, series in group.series.items()
        if series.error and not name.startswith(peers)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast llm_magic is.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP", help="these groups")
    parser.add_argument("--list", action="store_true", help="the groups")
    parser.add_argument("--large", action="store_true", help="also what writes large files (1.6 GB)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        help=f"seconds for one answer, and to load ({TIMEOUT_S:g})",
    )
    parser.add_argument("--folder", type=Path, help="where models are made, and stay (a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="where numbers go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
