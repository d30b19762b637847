"""The transformers backend: models that transformers runs and Accelerate places.

Light on purpose: torch, transformers and accelerate are imported by the functions that need them.
"""

from __future__ import annotations

import os
import re

from llm_magic.backends.accelerate.spinning import import_torch_calmly
from llm_magic.events import PhaseEvent, Progress
from llm_magic.hookspecs import Engine
from llm_magic.machine import Device, Link
from llm_magic.model import ModelLayout, ModelSpec
from llm_magic.plan import Plan

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class TransformersBackend:
    """Loads hub models, folders, ``.gguf`` files and the starter through transformers and Accelerate."""

    name = "transformers"

    def accepts(self, spec: ModelSpec) -> float:
        """How well it can load ``spec``: 0 to 1, from the source's look alone."""
        if spec.source == "starter":
            return 1.0
        # These of `os.path` say no to what cannot be a path, where those of `Path` fail.
        path = os.path.expanduser(spec.source)
        if os.path.isdir(path):
            return 0.9 if os.path.isfile(os.path.join(path, "config.json")) else 0.1
        if path.lower().endswith(".gguf"):
            return 0.5
        if _HUB_ID.fullmatch(spec.source):
            return 0.8
        # A path that is not there: ours to explain, unless another backend knows it.
        return 0.0 if "://" in spec.source else 0.05

    def layout(self, spec: ModelSpec, progress: Progress) -> ModelLayout:
        """What is in the model, read from its config and headers.

        Raises
        ------
        SourceError
            When the source cannot be found, read or trusted.
        """
        from llm_magic.backends.accelerate.source.sources import resolve

        files = resolve(spec, progress)
        progress(PhaseEvent("importing"))
        import_torch_calmly()
        from llm_magic.backends.accelerate.source.draft import with_draft
        from llm_magic.backends.accelerate.source.layout import read_layout

        return with_draft(read_layout(spec, files), spec, progress)

    def load(self, spec: ModelSpec, plan: Plan, progress: Progress) -> Engine:
        """Load it as planned.

        Raises
        ------
        PlanError
            When the plan does not fit, or the offload folder cannot be used.
        SourceError
            When the files are no model that transformers can load whole.
        EngineError
            When memory runs out on the way.
        """
        from llm_magic.backends.accelerate.source.sources import fetch_weights, resolve

        progress(PhaseEvent("reading"))
        files = fetch_weights(spec, resolve(spec, progress), progress)
        import_torch_calmly()
        from llm_magic.backends.accelerate.engine import TransformersEngine
        from llm_magic.backends.accelerate.load import load

        return TransformersEngine(load(files, spec, plan, progress))

    def accelerators(self, measure: bool) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
        """GPUs that torch can use, and the links to them."""
        import_torch_calmly()
        from llm_magic.backends.accelerate.devices import accelerators

        return accelerators(measure)
