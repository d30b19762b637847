"""Where the packed weights of a checkpoint belong in its model, as transformers puts plain ones there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_magic.backends.accelerate.architecture import path_of_head
from llm_magic.backends.accelerate.packed.prepacked import PackedByBitsAndBytes, Prepacked
from llm_magic.backends.accelerate.packed.prepacked_groups import PackedInGroups
from llm_magic.backends.accelerate.packed.prepacked_stacks import PackedStacks
from llm_magic.backends.accelerate.quantizing.methods import BLOCK, method_of
from llm_magic.backends.accelerate.quantizing.prepare import Choice
from llm_magic.backends.accelerate.source.packed_checkpoint import PackedCheckpoint
from llm_magic.errors import SourceError


def choice_for(model: Any, packed: PackedModel | None, method: str, head_method: str) -> Choice:
    """What is to be packed of a model: as its checkpoint has it, and the head by ``head_method``, if there is one.

    Raises
    ------
    OptionError
        When the head is of no kind that can be packed.
    """
    choice = packed.choice(method) if packed else Choice()
    return replace(choice, head=path_of_head(model), head_method=head_method) if head_method else choice


_MANY_STEPS = 3
"""Of any name in a pattern: more of them would take long to look for, and nobody writes them."""


@dataclass(frozen=True)
class PackedModel:
    """A checkpoint with packed weights, and the model that they are for.

    Attributes
    ----------
    checkpoint
        Where the weights are.
    model
        Not yet prepared for packed layers, best on the meta device.
    """

    checkpoint: PackedCheckpoint
    model: Any

    def choice(self, method: str) -> Choice:
        """What is to be packed of the model by this method, and in which groups."""
        if self._keeps_experts(method):
            return Choice(experts=self.checkpoint.format.method)
        if not self.checkpoint.is_kept(method):
            return Choice()
        has_groups = method_of(method).bits == 4 or not method_of(method).library
        return Choice(self._stays(), self.checkpoint.format.group if has_groups else None)

    def weights(self, dtype: Any, method: str) -> dict[str, Prepacked]:
        """The packed parameters of the model, by name.

        Parameters
        ----------
        dtype
            torch dtype in which they are computed.
        method
            By which the model's layers are packed.

        Raises
        ------
        SourceError
            When experts are stored in another way than one by one, or a layer has a bias that the model has not.
        """
        self._check_biases()
        files, found = self.checkpoint, self._places
        read = files.format.read
        if files.format.is_stacked:
            kept = files.format.method if files.is_kept(method) or self._keeps_experts(method) else ""
            parts = files.tensor, dtype, files.part, files.stored
            return {name: PackedStacks(kept, of, *parts) for name, of in found.items()}
        if read is None:
            packed = (files.format.method, files.needed, dtype, BLOCK)
            return {name: PackedByBitsAndBytes(packed[0], of, *packed[1:]) for name, of in found.items()}
        kept = method if files.is_kept(method) else ""
        return {name: PackedInGroups(kept, of, files.tensor, dtype, read) for name, of in found.items()}

    # Inside

    def _keeps_experts(self, method: str) -> bool:
        """Whether a method packs what the files have in 16 bits, and the experts of them stay: it makes them no smaller."""
        form = self.checkpoint.format
        is_other = bool(method) and form.is_stacked and not self.checkpoint.is_kept(method)
        return is_other and method_of(method).bits >= method_of(form.method).bits

    def _stays(self) -> list[str] | None:
        """Patterns for the layers that are not packed in the files, or become numbers.

        Without any files here: what the configuration says. ``None``: as transformers chooses.
        """
        from transformers.quantizers.base import get_keys_to_not_convert

        layers, skipped = list(_layers(self.model)), self.checkpoint.format.skipped
        # Where the last group is smaller than the others nothing computes with them.
        uneven = {name for name, weight in self.model.named_parameters() if self._is_uneven(weight)}
        paths = [path for path, names in layers if not uneven.isdisjoint(names)]
        if self.checkpoint.files:
            paths += [path for path, names in layers if self._places.keys().isdisjoint(names)]
        elif self.checkpoint.format.is_stacked:
            paths += [path for path, names in layers if names == [f"{path}.weight"]]
        elif skipped is not None:
            named = [_pattern(name) for name in skipped]
            paths += [path for path, _ in layers if any(name.search(f".{path}.") for name in named)]
            paths += get_keys_to_not_convert(self.model)
        elif paths:
            paths += get_keys_to_not_convert(self.model)
        else:
            return None
        # One pattern: they are asked for each module, and Python forgets all of them if they are too many.
        return [f"(?:{'|'.join(re.escape(path) for path in dict.fromkeys(paths))})$"] if paths else []

    def _is_uneven(self, weight: Any) -> bool:
        group = self.checkpoint.format.group
        return bool(group and weight.dim() > 1 and weight.shape[-1] % group)

    @cached_property
    def _places(self) -> dict[str, list[list[str]]]:
        """For every packed parameter of the model its matrices; see `Prepacked`."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        names, prefix = self.model.state_dict(), self.model.base_model_prefix
        stacks = {name.rpartition(".")[0] for name in names if name.rpartition(".")[0].endswith(".experts")}
        found: dict[str, list[list[str]]] = {}
        made: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self.checkpoint.packed:
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if pattern is not None:
                made[target][pattern].append(key)
            elif target in names:
                found[target] = [[key]] * (len(names[target]) if self.checkpoint.format.is_stacked else 1)
            elif f"{target.partition('.experts.')[0]}.experts" in stacks:
                raise self._cannot_be_put_together()  # as of Llama 4, whose plain weights are stacks in files, too
        for target, keys in made.items():
            found[target] = self._stacked(by_pattern[next(iter(keys))], keys)
        return found

    def _check_biases(self) -> None:
        """Refuse what nothing would add: AutoGPTQ writes biases for all layers, but of zeros."""
        files, names = self.checkpoint, self.model.state_dict()
        for target, matrices in self._places.items():
            held = f"{matrices[0][0].removesuffix('weight')}bias"
            is_lost = target.endswith(".weight") and f"{target.removesuffix('weight')}bias" not in names
            if is_lost and held in files.in_file and bool(files.tensor(held).any()):
                raise SourceError(
                    f"{files.name} has {held}, and its architecture has no bias there.",
                    "The files do not belong together: download the model again.",
                )

    def _stacked(self, converter: Any, keys: Mapping[str, list[str]]) -> list[list[str]]:
        """The matrices of a stack that transformers makes of single ones."""
        made_by = [type(operation).__name__ for operation in converter.operations]
        counts = {len(keys.get(pattern, ())) for pattern in converter.source_patterns}
        is_known = made_by in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        if not is_known or len(counts) > 1:
            raise self._cannot_be_put_together()
        return [
            list(of) for of in zip(*(keys[pattern] for pattern in converter.source_patterns), strict=True)
        ]

    def _cannot_be_put_together(self) -> SourceError:
        return SourceError(
            f"The packed weights of {self.checkpoint.name} cannot be put together as transformers does.",
            "Load the original model, with --quantize.",
        )


def _pattern(name: str) -> re.Pattern[str]:
    """What finds a name that a configuration leaves in a path, which has a dot before and behind; ``*`` is any step."""
    steps = ["[^.]*" if step == "*" else re.escape(step) for step in name.strip("^$").split(".")]
    found = r"\.".join(("", *steps, "")) if name.count("*") <= _MANY_STEPS else "(?!)"
    return re.compile(found)


def _layers(model: Any) -> Iterator[tuple[str, list[str]]]:
    """Modules that could be packed, and the names of their weights."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, Linear | Conv1D):
            yield path, [f"{path}.weight"]
        elif hasattr(module, "is_concatenated"):  # experts, in transformers' interface for them
            stacks = (name for name, p in module.named_parameters(recurse=False) if p.dim() == 3)
            yield path, [f"{path}.{name}" for name in stacks]
