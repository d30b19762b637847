"""`python -m benchmarks`: run groups, print tables, write JSON."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from benchmarks import cpu, gpu
from benchmarks.cpu import Setup
from benchmarks.report import Report, print_header


def main() -> int:
    """Run what was asked for; 1 when something of ours failed."""
    arguments = parse_arguments()
    groups = {**cpu.GROUPS, **gpu.GROUPS}
    if arguments.list:
        for name, group in groups.items():
            print(f"{name:14}{(group.__doc__ or '').splitlines()[0]}")
        return 0
    device = gpu.device_name()
    chosen = arguments.only or [*cpu.GROUPS, *(gpu.GROUPS if device else ())]
    print_header(arguments.repeats, device)
    report = Report(facts={"gpu": device, "arguments": sys.argv[1:]})
    kept = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory("-llm-magic")
    with kept as folder:
        setup = Setup(report, Path(folder), arguments.repeats, arguments.tokens, arguments.large)
        try:
            for name in chosen:
                run(name, setup, device)
                report.write(arguments.json)  # whatever comes after it
        except KeyboardInterrupt:
            print("\nInterrupted.")
        report.print_figures()
    report.write(arguments.json)
    print(f"\nWritten to {arguments.json}")
    return int(any(failed(report)))


def run(name: str, setup: Setup, device: str) -> None:
    """One group; a model that cannot be made leaves out the groups that need it, and no other."""
    if name in gpu.GROUPS and not device:
        setup.report.skip(f"{name} (no CUDA device)")
        return
    try:
        {**cpu.GROUPS, **gpu.GROUPS}[name](setup)
    except RuntimeError as error:
        setup.report.skip(f"{name} ({error})")


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
    names = [*cpu.GROUPS, *gpu.GROUPS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast llm_magic is.")
    parser.add_argument("--only", nargs="+", choices=names, metavar="GROUP", help="these groups")
    parser.add_argument("--list", action="store_true", help="the groups")
    parser.add_argument("--large", action="store_true", help="also what writes large files (1.6 GB)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--folder", type=Path, help="where models are made, and stay (a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="where numbers go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
