"""Weights that stay in their files are not read while transformers loads a model.

transformers reads every weight, also one of which it then only remembers where it is. Of a model whose
larger part is on the disk that would be minutes, and for one that is packed block by block everything twice.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def left_in_files(hidden: Collection[str] = (), given: Collection[str] = ()) -> Iterator[None]:
    """While this thread loads a model: what is to stay on the disk, as it is in the model's files, stays there.

    Parameters
    ----------
    hidden
        Tensors of the files that transformers does not see at all.
    given
        Parameters of the model that others make of them.
    """
    import torch
    from transformers import core_model_loading, modeling_utils

    usual_index = getattr(modeling_utils, "accelerate_disk_offload", None)
    renaming = getattr(core_model_loading, "WeightRenaming", None)
    if usual_index is None or renaming is None:  # of another version: it reads them
        yield
        return
    usual_convert, usual_load = renaming.convert, modeling_utils.convert_and_load_state_dict_in_model
    thread, stay = threading.get_ident(), set[str]()

    def index_of(model: Any, *args: Any, **options: Any) -> Any:
        index = usual_index(model, *args, **options)
        if threading.get_ident() == thread:
            stay.update(name for name, _ in model.named_parameters(remove_duplicate=False) if name in index)
        return index

    def convert(self: Any, *args: Any, **options: Any) -> Any:
        target = self.target_patterns[0]
        if threading.get_ident() != thread or target not in stay or self.quantization_operation is not None:
            return usual_convert(self, *args, **options)
        self.collected_tensors.clear()
        return {target: [torch.empty(0, device="meta")]}  # whose place in its file is known

    def load(model: Any, state_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return usual_load(model, state_dict, *args, **options)
        shown = {name: tensor for name, tensor in state_dict.items() if name not in hidden}
        info, index = usual_load(model, shown, *args, **options)
        info.missing_keys.difference_update(given)
        return info, index

    modeling_utils.accelerate_disk_offload = index_of
    modeling_utils.convert_and_load_state_dict_in_model = load
    renaming.convert = convert
    try:
        yield
    finally:
        modeling_utils.accelerate_disk_offload = usual_index
        modeling_utils.convert_and_load_state_dict_in_model = usual_load
        renaming.convert = usual_convert
