"""A device map that a person wrote -> one device for every block, or an error that names the culprit.

Keys are module names as in Accelerate (``"model.layers.3"``, a parent such as ``"model.layers"``,
``""`` for everything) or our labels (``"layers.3"``, ``"embed"``). The most specific key wins.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from llm_magic.errors import PlanError
from llm_magic.folders import display_path
from llm_magic.machine import Machine
from llm_magic.model import Block, ModelLayout
from llm_magic.planning.budget import device_name
from llm_magic.planning.costs import main_device
from llm_magic.planning.policies import tied_groups

_LARGEST_FILE = 16 << 20


def read_device_map(path: Path, layout: ModelLayout, machine: Machine) -> dict[str, str]:
    """Block name -> device, from a JSON object ``{"block or module name": device}``.

    Raises
    ------
    PlanError
        When the file is no such object, names a key twice, an unknown device or an unknown module,
        leaves a block out, splits one, or separates tied blocks.
    """
    return resolve_device_map(_read_object(path), layout, machine)


def resolve_device_map(
    device_map: Mapping[str, object], layout: ModelLayout, machine: Machine
) -> dict[str, str]:
    """Block name -> device, in model order; see ``read_device_map`` for the errors."""
    devices = _by_module(device_map, layout, machine)
    homes = {block.name: home for block in layout.blocks if (home := _home(block, devices))}
    for group in tied_groups(layout):
        _settle_ties(group, homes)
    _settle_buffers(layout, homes, machine)
    missing = [block.label for block in layout.blocks if block.name not in homes]
    if missing:
        raise PlanError(
            f"The device map leaves out {_listed(missing)}.",
            'Add them, or a parent such as "" for everything else.',
        )
    return {block.name: homes[block.name] for block in layout.blocks}


def _read_object(path: Path) -> dict[str, object]:
    name = display_path(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise PlanError(f"{name} is too large to be a device map.", "Give a JSON file of block names.")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError:
        raise PlanError(f"Cannot read the device map {name}.", "Check the file's name and rights.") from None
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise PlanError(
            f"{name} is no JSON{line}.", 'Write it like {"": "cuda:0", "layers.3": "cpu"}.'
        ) from None
    if not isinstance(content, dict):
        raise PlanError(f"{name} holds no JSON object.", 'Write it like {"": "cuda:0", "layers.3": "cpu"}.')
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(f"The device map names {key[:200]!r} twice.", "Keep one line for it.")
        found[key] = value
    return found


def _by_module(device_map: Mapping[str, object], layout: ModelLayout, machine: Machine) -> dict[str, str]:
    """Module name -> device: labels replaced by block names, every key and value checked."""
    labels = {block.label: block.name for block in layout.blocks}
    modules = _modules(layout)
    devices: dict[str, str] = {}
    for key, value in device_map.items():
        name = key if key in modules else labels.get(key, key)
        if name not in modules:
            raise _unknown_module(key, layout)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise PlanError(
                f"The device of {key[:200]!r} is no device name.", 'Write "cuda:0", "cpu" or "disk".'
            )
        device = device_name(value, machine)
        if name in devices:
            raise PlanError(f"The device map places {name} twice.", "Keep its name or its label, not both.")
        devices[name] = device
    return devices


def _modules(layout: ModelLayout) -> frozenset[str]:
    """Every name that a map may use: modules that hold a parameter or a buffer."""
    return layout.module_names | set(layout.details.get("buffer_modules", ()))


def _prefixes(name: str) -> Iterable[str]:
    """``"a.b.c"`` -> ``"a.b.c"``, ``"a.b"``, ``"a"``, ``""``: most specific first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _home(block: Block, devices: Mapping[str, str]) -> str | None:
    """The one device of all of the block's tensors; ``None`` when some or all have none."""
    names = [tensor.name for tensor in block.tensors] or [block.name]
    found = {name: next((devices[p] for p in _prefixes(name) if p in devices), None) for name in names}
    homes = set(found.values())
    if len(homes - {None}) > 1:
        split = " and ".join(sorted(home for home in homes if home))
        raise PlanError(
            f"The device map splits {block.label} over {split}, but a block is placed as a whole.",
            f'Give one device for "{block.name}".',
        )
    return None if None in homes else homes.pop()


def _settle_ties(group: tuple[Block, ...], homes: dict[str, str]) -> None:
    """Tied blocks share one home; one that holds no tensor of its own may be left out of the map."""
    given = {homes[block.name] for block in group if block.name in homes}
    if len(given) > 1:
        labels = _listed([block.label for block in group])
        raise PlanError(
            f"{labels} share a tensor, but the device map puts them on {' and '.join(sorted(given))}.",
            f"Put them all on {sorted(given)[0]}.",
        )
    if given:
        home = given.pop()
        homes.update({block.name: home for block in group if not block.tensors})


def _settle_buffers(layout: ModelLayout, homes: dict[str, str], machine: Machine) -> None:
    """A block of buffers only, such as the rotary embedding, may be left out: it stays where things compute."""
    if not homes:
        return
    idle = {block.name for block in layout.blocks if block.is_idle}
    place = main_device((home for name, home in homes.items() if name not in idle), machine)
    for block in layout.blocks:
        if not block.tensors and not block.tied_to:
            homes.setdefault(block.name, place)


def _unknown_module(key: str, layout: ModelLayout) -> PlanError:
    known = [name for block in layout.blocks for name in (block.label, block.name)]
    close = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"Did you mean {close[0]!r}?" if close else "`%llm map` shows the names of the blocks."
    return PlanError(f"The model has no block {key[:200]!r}.", hint)


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
