"""Weights that are packed, or unpacked, while they are loaded: a block at a time, on its way to its place.

Some weights are in no file as they are needed, as stacks of experts, which transformers makes while it reads. It
writes them to the offload folder, where a model would be as large as it is unpacked. So they are packed before
they are written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_magic.backends.accelerate.files.extents import Extent
from llm_magic.backends.accelerate.memory_errors import trim
from llm_magic.backends.accelerate.packed import packing
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.prepacked_stacks import PackedStacks
from llm_magic.backends.accelerate.packed.templates import bind
from llm_magic.backends.accelerate.placement.blocks import raw
from llm_magic.backends.accelerate.placement.hooks import strip, weights_loader
from llm_magic.backends.accelerate.placement.placed import Fill
from llm_magic.backends.accelerate.quantizing.pack import leave_stack, pack_block, pack_stack
from llm_magic.backends.accelerate.quantizing.packed_head import untie_head
from llm_magic.backends.accelerate.quantizing.prepare import Choice, prepare
from llm_magic.backends.accelerate.source.packed_checkpoint import find_packed
from llm_magic.backends.accelerate.source.packed_model import PackedModel, choice_for
from llm_magic.backends.accelerate.source.skeleton import build_skeleton
from llm_magic.backends.accelerate.source.sources import ModelFiles
from llm_magic.events import PhaseEvent, PhaseName, Progress
from llm_magic.plan import Placement, Plan


class PackedLoad:
    """What packs the weights of one model.

    Parameters
    ----------
    config
        Transformers' configuration of the model.
    files
        Of the model.
    plan
        How to pack, and where everything goes.
    folder
        Where transformers writes what is in no file as it is needed.
    progress
        Is told of every block.

    Attributes
    ----------
    hidden
        Tensors of the files that transformers shall not read, because they are packed already.
    """

    def __init__(self, config: Any, files: ModelFiles, plan: Plan, folder: Path, progress: Progress) -> None:
        import torch

        self._folder = folder
        self._method, self._dtype = plan.layout.quantization, getattr(torch, plan.layout.dtype)
        self._plan, self._progress = plan, progress
        checkpoint, model = find_packed(files), build_skeleton(config, self._dtype)
        packed = PackedModel(checkpoint, model) if checkpoint else None
        self.hidden = checkpoint.keys if checkpoint else frozenset[str]()
        self._choice = Choice()
        if self._method:
            self._choice = choice_for(model, packed, self._method, plan.layout.head_quantization)
        self._prepacked = packed.weights(self._dtype, self._method) if packed else {}
        if self._choice.head:
            untie_head(model, self._choice.head)
        self._skeleton, self._modules = model, self._prepared(model)
        self._stored = checkpoint.stored if checkpoint else lambda _name: None
        self._written: set[str] = set()
        self._alike: defaultdict[str, list[str]] = defaultdict(list)
        self._owed: set[str] = set()

    @property
    def given(self) -> Collection[str]:
        """Parameters that are made of those tensors."""
        return self._prepacked.keys()

    @cached_property
    def extents(self) -> dict[str, Extent]:
        """Bytes of the files that parameters have as they are, by the name of the parameter.

        Those of experts that nobody packs here, with their biases.

        Raises
        ------
        SourceError
            When they do not belong together.
        """
        found: dict[str, Extent] = {}
        for owner, stacks in self._stacks.items():
            biases = {name: self._as_in_file(name) for name in self._beside(owner)}
            if None not in biases.values():
                found |= {name: extent for name, extent in biases.items() if extent}
                for name, value in stacks.items():
                    found |= {f"{name}.{part}": extent for part, extent in value.extents().items()}
        return found

    @cached_property
    def _stacks(self) -> dict[str, dict[str, PackedStacks]]:
        """What stays as the files have it, by the module of the experts and its name."""
        found: defaultdict[str, dict[str, PackedStacks]] = defaultdict(dict)
        for name, value in self._prepacked.items():
            if isinstance(value, PackedStacks) and value.method:
                found[name.rpartition(".")[0]][name] = value
        return found

    def _beside(self, owner: str) -> list[str]:
        """The parameters that a module of experts has beside its stacks."""
        return [f"{owner}.{name}" for name in self._skeleton.get_submodule(owner)._parameters]

    def _as_in_file(self, name: str) -> Extent | None:
        """Where the bytes of a parameter are; ``None`` where it is no tensor of the files."""
        stored, parameter = self._stored(name), self._skeleton.get_parameter(name)
        is_it = stored and (f"torch.{stored.dtype}", stored.shape) == (str(parameter.dtype), parameter.shape)
        is_even = stored is not None and not stored.extent.offset % parameter.dtype.itemsize
        return stored.extent if stored and is_it and is_even else None

    @contextmanager
    def packs_what_is_written(self) -> Iterator[None]:
        """While transformers loads the model: what it writes is packed, if it is to be."""
        from transformers import core_model_loading

        usual = getattr(core_model_loading, "offload_weight", None)
        if usual is None:  # then they are written as they are, and packed with their blocks
            yield
            return

        def offload(weight: Any, name: str, folder: str, index: dict[str, Any]) -> Any:
            if folder is None or Path(folder) != self._folder:  # of another model, in another thread
                return usual(weight, name, folder, index)
            for part, tensor in self._packed(name, weight):
                index = usual(tensor, part, folder, index)
            return index

        core_model_loading.offload_weight = offload
        try:
            yield
        finally:
            core_model_loading.offload_weight = usual

    def fill(self, model: Any) -> Fill:
        """Prepare the loaded model: what it returns gives each of its blocks the weights."""
        import torch

        loader = weights_loader(model)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        strip(model)
        self._alike = _alike(model)
        self._owed = set(self._alike[f"{self._choice.head}.weight"])
        if self._choice.head:
            untie_head(model, self._choice.head)
        tied = dict(model.all_tied_weights_keys or {})
        shared = set(tied.values())
        if self._method:
            prepare(model, self._method, self._dtype, self._choice)
        self._fill_loose_parameters(model, loader, names)
        done = 0

        def fill(place: Placement, block: Any) -> None:
            nonlocal done
            count = len(self._plan.placements)
            packs: PhaseName = "quantizing" if self._method else "loading"
            self._progress(PhaseEvent(packs, done, count, "blocks", place.block.label))
            done += 1
            prefix = f"{place.block.name}."
            wanted = [name for name in names if name.startswith(prefix) and name not in tied]
            device = "cpu" if place.is_looked_up else place.modules_on
            left = self._leave(model, wanted) if place.home == "disk" else set[str]()
            plain = [name for name in wanted if name not in self._written and name not in left]
            weights = {name.removeprefix(prefix): self._weight(name, loader) for name in plain}
            with torch.no_grad():
                for name in self._written.intersection(wanted):
                    self._take(name, model, loader, device)
                pack_block(block, weights, device, device, _experts_on(place))
            _remove_written(loader, self._folder, prefix, self._owed)
            if self._choice.head == place.block.name:  # the last one
                for name in self._owed:
                    _remove_written(loader, self._folder, name)
            if any(name in shared for name in wanted):
                model.tie_weights()
            trim()  # else the weights that were packed stay in malloc's hands, block after block

        return fill

    def _leave(self, model: Any, wanted: Collection[str]) -> set[str]:
        """Let modules have what stays in the files, without bytes; the names of all that is such."""
        left = set[str]()
        for owner, stacks in self._stacks.items():
            if stacks.keys() <= set(wanted) and f"{next(iter(stacks))}.weight" in self.extents:
                left.update(stacks, self._beside(owner))
                for name, value in stacks.items():
                    leave_stack(model.get_submodule(name), value)
        return left

    def _weight(self, name: str, loader: Any) -> Any:
        """What is known of a weight, by its name or that of another one of the same values: files have it under either."""
        names = [
            each for each in (name, *self._alike[name]) if each in self._prepacked or each in loader.all_keys
        ]
        known = self._prepacked.get(names[0]) if names else None
        return loader[names[0] if names else name] if known is None else known

    def _prepared(self, model: Any) -> dict[str, Any]:
        """The modules that hold packed weights, by the weights' names, without bytes."""
        if not self._method:
            return {}
        names = prepare(model, self._method, self._dtype, self._choice)
        return {name: model.get_submodule(name.removesuffix(".weight")) for name in names}

    def _packed(self, name: str, weight: Any) -> Iterator[tuple[str, Any]]:
        """What is written of a weight, by name."""
        import torch

        if name not in self._modules:
            yield name, weight
            return
        module, place = self._modules[name], self._place_of(name)
        device = place.modules_on
        with torch.no_grad():
            if isinstance(module, PackedStack):
                pack_stack(module, weight, device, device, _experts_on(place))
            else:
                pack_block(module, {"weight": weight}, device, device)
        for number, (owner, leaf) in enumerate(_parameters(module)):
            for part, tensor in packing.parts(owner, leaf).items():
                yield f"{name}.{number}.{part}", raw(tensor).cpu()
            bind(packing.template(owner, leaf).empty())
        self._written.add(name)

    def _take(self, name: str, model: Any, loader: Any, device: str) -> None:
        """Put a packed weight into its place, from what was written of it."""
        import torch

        module = self._modules.pop(name)
        if isinstance(module, PackedStack):
            device = _experts_on(self._place_of(name)) or device
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        model.get_submodule(owner)._modules[leaf] = module
        for number, place in enumerate(_parameters(module)):
            template = packing.template(*place)
            held = {}
            for part, (shape, dtype) in template.tensors.items():
                held[part] = torch.empty(shape, dtype=dtype, device=device)
                raw(held[part]).copy_(loader[f"{name}.{number}.{part}"])
            bind(template.bindings(held))

    def _place_of(self, name: str) -> Placement:
        return next(place for place in self._plan.placements if name.startswith(f"{place.block.name}."))

    def _fill_loose_parameters(self, model: Any, loader: Any, names: set[str]) -> None:
        """Give parameters outside of modules their weights, which no block has."""
        import torch

        for place in self._plan.placements:
            if place.block.name in names:
                path, _, leaf = place.block.name.rpartition(".")
                value = loader[place.block.name].to(place.modules_on)
                model.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _experts_on(place: Placement) -> str | None:
    """Where the experts of a split block go at once: the GPU may have no room for them even for a while."""
    return "cpu" if place.is_split else None


def _parameters(module: Any) -> list[tuple[Any, str]]:
    """The packed ones of a module, each with its owner."""
    names = list(module._parameters) if isinstance(module, PackedStack) else ["weight"]
    return [(module, name) for name in names]


def _alike(model: Any) -> defaultdict[str, list[str]]:
    """Names of parameters, and those of others that have their values."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for target, source in (model.all_tied_weights_keys or {}).items():
        found[target].append(source)
        found[source].append(target)
    return found


def _remove_written(loader: Any, folder: Path, prefix: str, owed: Collection[str] = ()) -> None:
    """Delete what was written to the folder of a block that has its weights, but for what another one is to have."""
    for name in [name for name in loader.index if name.startswith(prefix) and name not in owed]:
        path = Path(loader.index[name].get("safetensors_file", ""))
        if path.parent == folder:
            path.unlink()
            del loader.index[name]
