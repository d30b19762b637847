"""The sandbox and the budget in which a stranger's template runs.

Jinja's immutable sandbox keeps a template away from Python's internals; it does not stop
``{{ 'a' * 10**10 }}``. So whatever makes something new (operators, joins, literals, slices, calls,
filters, loop steps, the output) first asks a meter, which knows a size for each and looks at the
clock. Nothing large is made before it was paid for, and no thread is left behind.

The dialect is that of transformers' ``apply_chat_template``, without a few filters that no chat
template needs (``batch``, ``slice``, ``wordwrap``, ``urlize``, ``xmlattr``, ``pprint``) and ``lipsum``.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

TIME_LIMIT_S = 2.0
VALUE_LIMIT = 4 << 20  # characters (or items) of one value, beside what the input allows
TOTAL_LIMIT = 32 << 20  # of all values together
DEPTH_LIMIT = 64  # lists in lists
INTEGER_LIMIT = 8192  # bits
WIDTH_LIMIT = 10_000  # of padding and indentation
STEP_COST = 16  # a loop step or a call, in characters

_LEFT_OUT = ("batch", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
_FORBIDDEN_METHODS = frozenset({"encode", "maketrans", "to_bytes", "translate"})
# Filters that hand out what is there already, or a number.
_SELECTING = frozenset(
    {
        "abs",
        "attr",
        "count",
        "d",
        "default",
        "first",
        "float",
        "int",
        "last",
        "length",
        "max",
        "min",
        "random",
    }
)
# Widths of four digits, and widths that are computed.
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\d{4}|\d*\.\d{4}|(?:\d*\.)?\*)")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(?:\d{4}|\{)")
_PADDING = frozenset({"center", "expandtabs", "indent", "ljust", "rjust", "round", "zfill"})


def run(template: str, names: Mapping[str, Any]) -> str:
    """What the template writes. ``names`` must hold plain JSON types only.

    Raises
    ------
    Refusal
        When the template calls ``raise_exception``.
    OverBudgetError
        When it needs more than ``TIME_LIMIT_S`` seconds or the size limits.
    jinja2.sandbox.SecurityError
        When it reaches for Python's internals.
    Exception
        Whatever else its code raises.
    """
    environment = _Environment(_Meter(_tree(dict(names))[0]))
    program = jinja2.Template.from_code(environment, _compiled(template), environment.make_globals(None))
    return program.render(names)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    return _Environment(_Meter(0)).compile(template)


# --- What a template can call -----------------------------------------------------------------------


class _Dict:
    """``dict(...)`` without the type, which would be a way out."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without private names, and without a repr that could grow."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # (``namespace(self=…)`` must work)
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no private name such as {name[:40]!r}")


def _strftime_now(pattern: str) -> str:
    # Some C libraries pad to any width that the pattern asks for.
    if len(pattern) > 200 or re.search(r"%[^a-zA-Z]*\d", pattern):
        raise OverBudgetError("a date with padding")
    return datetime.now().strftime(pattern)  # local time, as the user reads it


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise Refusal(message)


# --- The meter --------------------------------------------------------------------------------------


class Refusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class OverBudgetError(jinja2.TemplateRuntimeError):
    """The template wants more time or memory than any conversation needs."""


class _Meter:
    """What a run has used. Sizes are characters of text or items of a list.

    Parameters
    ----------
    input_size
        Size of everything that goes into the template: longer conversations may use more.
    """

    def __init__(self, input_size: int) -> None:
        self._value_limit = VALUE_LIMIT + 8 * input_size
        self._left = TOTAL_LIMIT + 256 * input_size
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def pay(self, size: int) -> None:
        """Pay for a value of this size, before it is made where that is possible."""
        self._check(size)
        self._left -= size + STEP_COST
        if self._left < 0:
            raise OverBudgetError("it does far more than the conversation needs")
        if time.monotonic() > self._deadline:
            raise OverBudgetError(f"it takes longer than {TIME_LIMIT_S:g} s")

    def _check(self, size: int) -> None:
        if size > self._value_limit:
            raise OverBudgetError("it makes a value that is far too large")

    def made(self, value: Any) -> Any:
        """Pay for a list or text that was just made; returns it.

        What is in a list was paid for before. Its size written out is checked only: lists of the
        same lists take little memory until something writes or compares them.
        """
        self._check(_tree(value)[0])
        self.pay(_length(value))
        return value

    def steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values one by one, each paid for."""
        for value in values:
            self.pay(0)
            yield value

    def joined(self, parts: Iterable[Any], separator: str = "") -> str:
        """The parts as one string."""
        texts, size = [], 0
        for part in parts:
            texts.append(part if type(part) is str else str(part))
            size += len(texts[-1]) + len(separator)
            self.pay(len(texts[-1]) + len(separator))
        self.pay(size)
        return separator.join(texts)


def _tree(value: Any) -> tuple[int, int]:
    """Size of a value written out, and how deeply it is nested.

    An item that is in a list twice counts twice, but is looked at once: a doubled list of doubled
    lists has an exponential size and is measured in linear time.
    """
    return _measure(value, {}, DEPTH_LIMIT)


def _measure(value: Any, seen: dict[int, tuple[int, int]], depth_left: int) -> tuple[int, int]:
    if isinstance(value, str):
        return len(value) + 1, 0
    if not isinstance(value, list | tuple | dict | set | frozenset):
        return 1, 0
    if id(value) in seen:
        return seen[id(value)]
    if depth_left == 0:
        raise OverBudgetError("it nests lists too deeply")
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    measures = [_measure(item, seen, depth_left - 1) for item in items]
    total = 1 + sum(size for size, _ in measures), 1 + max((depth for _, depth in measures), default=0)
    seen[id(value)] = total
    return total


def _integers(values: Iterable[Any]) -> Iterator[int]:
    return (abs(value) for value in values if isinstance(value, int))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _replaced_size(text: str, old: Any, new: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _formatted_size(pattern: str, marker: str, values: Iterable[Any]) -> int:
    """At most how long a formatted text gets; refuses widths, which need no value to be large."""
    if (_PERCENT_WIDTH if marker == "%" else _BRACE_WIDTH).search(pattern):
        raise OverBudgetError("it pads text to a width that no prompt needs")
    longest = max((_tree(value)[0] for value in values), default=0)
    return len(pattern) + pattern.count(marker) * (1000 + 10 * longest)


# --- The sandbox ------------------------------------------------------------------------------------


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a meter at everything that can grow."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: _Meter) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_GenerationTag, loopcontrols]
        )
        self.meter = meter
        self.concat = meter.joined  # type: ignore[method-assign]  # declared as a ClassVar
        self.globals.pop("lipsum")
        self.globals.update(
            dict=_Dict(), namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
        )
        self.filters["tojson"] = _tojson
        self.filters["join"] = self._join
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters = {name: self._metered(name, run) for name, run in self.filters.items()}
        self.filters.update(_made=meter.made, _steps=meter.steps, _joined=meter.joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _AddMeters().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _FORBIDDEN_METHODS and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{type(obj).__name__}.{attribute}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        self.meter.pay(_operation_size(operator, left, right))
        result = self.binop_table[operator](left, right)
        return self.meter.made(result) if isinstance(result, list | tuple) else result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as Jinja's)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = __obj.__name__
            if name == "join" and args:
                return __self.meter.joined(args[0], owner)
            __self.meter.pay(_text_size(name, owner, args, kwargs))
        else:
            __self.meter.pay(0)
        return __self.meter.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            self.meter.pay(_formatted_size(value.__self__, "{", (*args, *kwargs.values())))
            return wrapped(*args, **kwargs)

        return run

    def _metered(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        passes_first = hasattr(apply, "jinja_pass_arg")  # the context or the like comes before the value

        @functools.wraps(apply)
        def metered(*args: Any, **kwargs: Any) -> Any:
            value, *options = args[1:] if passes_first else args
            if name in _SELECTING:
                self.meter.pay(0)
                return apply(*args, **kwargs)
            self.meter.pay(_filter_size(name, value, options, kwargs))
            return self.meter.made(apply(*args, **kwargs))

        return metered

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return self.meter.joined(values, str(d))


class _AddMeters(NodeTransformer):
    """Send what a template builds through the environment's private filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (Jinja's visitors)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return _filtered(parts, "_joined")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, "_made")

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_made")

    visit_Dict = visit_List  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_made") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's text for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside do not leave it.
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


# --- Sizes of what is about to be made ----------------------------------------------------------------


def _operation_size(symbol: str, left: Any, right: Any) -> int:
    if symbol == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else [right]
        return _formatted_size(left, "%", values.values() if isinstance(values, dict) else values)
    if symbol == "+":
        return _length(left) + _length(right)
    if isinstance(left, int) and isinstance(right, int):
        _check_integer(symbol, left, right)
    elif symbol == "*":
        count = next(_integers((left, right)), 0)
        return count * max(_length(left), _length(right))
    return 1


def _check_integer(symbol: str, left: int, right: int) -> None:
    bits = left.bit_length() * abs(right) if symbol == "**" else left.bit_length() + right.bit_length()
    if symbol != "%" and bits > INTEGER_LIMIT:
        raise OverBudgetError("it makes a number that is far too large")


def _text_size(name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """At most how long the result of a method of ``str`` gets."""
    values = (*args, *kwargs.values())
    if name in _PADDING and any(width > WIDTH_LIMIT for width in _integers(values)):
        raise OverBudgetError("it pads text to a width that no prompt needs")
    if name == "expandtabs":
        return len(text) + text.count("\t") * max(_integers(values), default=8)
    if name == "replace" and len(args) >= 2:
        return _replaced_size(text, args[0], args[1])
    return len(text) * 3 + max(_integers(values) if name in _PADDING else (), default=0)


def _filter_size(name: str, value: Any, options: list[Any], kwargs: Mapping[str, Any]) -> int:
    """At most how large the result of a filter gets."""
    everything = (*options, *kwargs.values())
    if name in _PADDING and any(width > WIDTH_LIMIT for width in _integers(everything)):
        raise OverBudgetError("it pads text to a width that no prompt needs")
    if name == "sum" and not all(isinstance(item, int | float | str) for item in everything):
        raise OverBudgetError("it adds up lists")
    if name == "replace":
        old, new = (*everything, "", "")[:2]
        return _replaced_size(str(value), old, new) if old != "" else len(str(value)) * (1 + len(str(new)))
    if name == "format":
        return _formatted_size(str(value), "%", everything)
    if name in ("indent", "tojson"):
        return _indented_size(name, value, everything)
    return _length(value)


def _indented_size(name: str, value: Any, options: tuple[Any, ...]) -> int:
    width = max((*_integers(options), *(len(o) for o in options if isinstance(o, str))), default=4)
    if name == "indent":
        return len(str(value)) + (str(value).count("\n") + 1) * width
    size, depth = _tree(value)
    return 6 * size + size * depth * (width if options else 0)
