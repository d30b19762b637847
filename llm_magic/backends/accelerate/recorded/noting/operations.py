"""Operations that reach torch's dispatcher while a layer's code runs: each is computed, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.known_numbers import KnownNumbers
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors, tensors_in
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.recorded.noting.routers import RouterMatrices
from llm_magic.backends.accelerate.recorded.recording import VARYING, views_in


class Operations:
    """What the dispatcher asks for operations.

    Parameters
    ----------
    numbers, matrices
        They learn of each operation.
    """

    def __init__(
        self, tensors: KnownTensors, notes: Notes, numbers: KnownNumbers, matrices: RouterMatrices
    ) -> None:
        self._tensors, self._notes, self._numbers, self._matrices = tensors, notes, numbers, matrices

    def compute(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation makes.

        Raises
        ------
        CannotRecordError
            When it would not be the same one in another sweep.
        """
        import torch

        if self._is_fixed(function, args, kwargs):
            result = function(*args, **kwargs)
            self._tensors.fix(result)
            return result
        if _looks_at_numbers(function, args):
            raise CannotRecordError(f"{function} looks at numbers")
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise CannotRecordError(f"{function} draws numbers")
        shown = self._tensors.shown_call(args, kwargs)
        if any(view.shape == VARYING for view in views_in(shown)):
            raise CannotRecordError(f"{function} computes with what is longer in every sweep")
        if function._schema.is_mutable:
            return self._changing(function, args, kwargs, shown)
        router = self._matrices.router_of(function, shown)
        if router is not None:
            return self._products_of_router(*router, args[-2])
        result = function(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(each, torch.Tensor) for each in results):
            raise CannotRecordError(f"{function} makes no tensor")
        if _is_view(function) and all(each.dtype == args[0].dtype for each in results):
            for each in results:
                self._tensors.know_part(each, args[0])
        else:
            self._note_results(function, args, shown, results)
        return result

    def _is_fixed(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation takes nothing but what code has made of numbers of its own, and so gives no others."""
        import torch

        if function is torch.ops.aten.lift_fresh.default:
            # How ``torch.tensor`` ends. What was a list may change; a number is itself.
            return not self._tensors.is_known(args[0]) and not args[0].dim()
        taken = list(tensors_in((args, kwargs)))
        is_pure = not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags
        return bool(taken) and is_pure and all(map(self._tensors.is_fixed, taken))

    def _changing(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: tuple[Any, Any]
    ) -> Any:
        """One that changes its first tensor."""
        changed = [each.name for each in function._schema.arguments if each.is_write]
        is_first = changed == [function._schema.arguments[0].name]
        if not is_first or not self._tensors.may_change(args[0]):
            raise CannotRecordError(f"{function} changes what is not the layer's own")
        result = function(*args, **kwargs)
        before, after = self._tensors.change(args[0])
        self._numbers.learn_change(function, shown[0], after)
        self._notes.operation(function, shown, (after,), changes=before)
        return result

    def _products_of_router(self, module: Any, rows: int, tokens: Any) -> Any:
        with unseen():
            shape = len(tokens), rows
            (out,) = self._notes.module("router", module, ((tokens,), {}), [shape], tokens.dtype)
        return out

    def _note_results(
        self, function: Any, args: tuple[Any, ...], shown: tuple[Any, Any], results: Sequence[Any]
    ) -> None:
        import torch

        if _is_view(function):  # the same memory, as other numbers: nobody may change it by either
            self._tensors.disown(args[0])
        take = self._tensors.new if _is_view(function) else self._tensors.new_own
        outputs = tuple(take(each) for each in results)
        self._numbers.learn(function, shown[0], outputs)
        self._matrices.learn(function, shown[0], outputs)
        if self._hides_nothing(function, args):
            function, shown = torch.ops.aten.clone.default, (shown[0][:1], ())
        self._notes.operation(function, shown, outputs)

    def _hides_nothing(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation puts a number where a mask is true, and that is nowhere, in every sweep."""
        if not str(function).startswith("aten.masked_fill."):
            return False
        with unseen():
            return self._numbers.are_uniform(self._tensors.view(args[1])) and not args[1].any()


def _is_view(function: Any) -> bool:
    return any(each.alias_info is not None for each in function._schema.returns)


def _looks_at_numbers(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation gives Python numbers, or tensors whose shape depends on them."""
    import torch

    if function is torch.ops.aten.index.Tensor:  # by places it does not, by a mask it does
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))
