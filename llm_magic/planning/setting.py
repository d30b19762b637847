"""What homes of blocks are judged in: a model, a machine with a budget, a workload, constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_magic.machine import Machine
from llm_magic.model import ModelLayout
from llm_magic.plan import DeviceUse, MemoryBudget, Placement, Plan, Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.costs import device_uses


@dataclass(frozen=True)
class Setting:
    """Everything that a plan depends on, beside where its blocks are."""

    layout: ModelLayout
    machine: Machine
    budget: MemoryBudget
    workload: Workload
    constants: Constants = field(default_factory=Constants)

    @staticmethod
    def of(plan: Plan, constants: Constants) -> Setting:
        """The setting that a plan was made in."""
        return Setting(plan.layout, plan.machine, plan.budget, plan.workload, constants)

    def uses(self, placed: Sequence[Placement]) -> tuple[DeviceUse, ...]:
        """Bytes by purpose of every device."""
        return device_uses(self.layout, self.machine, self.budget, self.workload, placed)
