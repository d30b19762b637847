from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llm_magic.text.history import ErrHistory
from llm_magic.text.prompt import interpolate


def double(value: int) -> int:
    return value * 2


def fail() -> None:
    raise RuntimeError("no \x1b[31mluck")


NAMES: dict[str, Any] = {
    "x": 3,
    "a": 1,
    "b": 2,
    "i": 5,
    "n": 7,
    "name": "Ada",
    "price": 3.14159,
    "words": ["red", "blue"],
    "d": {"k": 1, "a:b": 2, "}": 4},
    "hostile": "{name} {{x}} {fail()}",
    "double": double,
    "fail": fail,
    "frame": pd.DataFrame({"q": range(3)}),
    "In": ["", "1 + 1"],
    "Out": {1: 2},
}


def lookup(expression: str) -> object:
    return eval(expression, dict(NAMES))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("{x}", "3"),
        ("Dear {name}, {x} times.", "Dear Ada, 3 times."),
        ("{name}{x}{name}", "Ada3Ada"),
        ("{d['k']} {d[\"a:b\"]} {d['}']}", "1 2 4"),
        ("{words[0]} {words[-1].upper()}", "red BLUE"),
        ("{x + 1} {x > 2} {-x} {(x, a)[0]}", "4 True -3 3"),
        ("{double(x)} {sum([a, b])} {[w for w in words]}", "6 3 ['red', 'blue']"),
        ("{price:.2f} {x:05d} {price!r:>10.4} {name!r} {name:>5}", "3.14 00003       3.14 'Ada'   Ada"),
        ("{x if a else b} {words[0] if x else ':'}", "3 red"),
        ("{In[1]} gave {Out[1]}", "1 + 1 gave 2"),
        ('{"a": {x}, "b": [{a}]}', '{"a": 3, "b": [1]}'),
        ("model_{n}.txt run_{a}_{b}", "model_7.txt run_1_2"),
        ("```python\n{In[1]}\n```", "```python\n1 + 1\n```"),
        (r"\text{Total: {x}}", r"\text{Total: 3}"),
        ("100 % of {x}% and {name}'s", "100 % of 3% and Ada's"),
    ],
)
def test_expressions_are_replaced(text: str, prompt: str) -> None:
    found = interpolate(text, lookup)
    assert found.text == prompt
    assert found.notes == ()


@pytest.mark.parametrize(
    "text",
    [
        # JSON
        '{"a": 1}',
        '{"a": {"b": 1}, "c": [{}, {"d": "{e}"}]}',
        '{"x": "{}"}',
        json.dumps({"name": {"x": [1, {"a": None}]}}, indent=2),
        "{'a': 1}",
        "{x: 1, a: 2}",
        "{x:1,a:2}",
        "{x:1}",
        "{{{}}}",
        # LaTeX
        r"\frac{a}{b} \sqrt[3]{x} x^{a} x_{i} \sum_{i}^{n} \mathbf{x} \begin{a} e^{i} \alpha_{i} \left\{x\right\}",
        r"\frac{\frac{a}{b}}{x} \{x\} {\bf x} (a+b)_{i} \mathbb{R}^{n}",
        "$\\binom{n}{a} = \\hat{x}_{i}$",
        # code
        'f"{x}" f\'{name!r}\' rf"{x}" F"""\n{x}\n"""',
        "\"{x}\".format(x=1) and '{a} {b}' .format(a=1)",
        "echo ${x} `${name}`",
        "for (;;) { x; } if(a){b} () =>{x} { x } {\n x\n}",
        "int f(void) {\n  return x;\n}\nstruct s { int a; };",
        "p { color: red } a{b:c}",
        "{a, b} {1} {1, 2} {'s'} {} {*a} {**d} {x for x in a}",
        "{lambda: x} {(y := 3)} {await x} {yield}",
        "{{x}} {{ x }} {% if x %} {# x #}",
        r"\d{2} a{2,3} [a-z]{n,}",
        "@article{key, title={The {Art}}}",
        "{ and } and {x",
        "}{",
    ],
)
def test_other_braces_stay_byte_for_byte(text: str) -> None:
    assert interpolate(text, lookup).text == text


def test_values_are_not_read_again() -> None:
    assert interpolate("{hostile} {x}", lookup).text == "{name} {{x}} {fail()} 3"


def test_every_expression_is_evaluated_once() -> None:
    calls: list[str] = []

    def count(expression: str) -> object:
        calls.append(expression)
        return len(calls)

    assert interpolate("{f()} {g()} {f()}", count).text == "1 2 1"
    assert calls == ["f()", "g()"]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("{foo}", "{foo} left alone: name 'foo' is not defined"),
        ("{foo.bar[1]}", "{foo.bar[1]} left alone: name 'foo' is not defined"),
        ("{d['z']}", "{d['z']} left alone: there is no key 'z'"),
        ("{x.nope}", "{x.nope} left alone: AttributeError: 'int' object has no attribute 'nope'"),
        ("{fail()}", "{fail()} left alone: RuntimeError: no [31mluck"),
        ("{len}", "{len} left alone: its source is not there to be shown"),
        ("{x:%Y}", ""),
        ('f"{x}"', "{x} left alone: it is in a formatted string"),
        (r"\frac{a}{b}", "{a}, {b} left alone: it reads as LaTeX"),
        (r"\frac{p}{q}", ""),
        ('{"foo": 1}', ""),
        ("{x + foo}", ""),
    ],
)
def test_what_was_left_is_named(text: str, note: str) -> None:
    found = interpolate(text, lookup)
    if text != "{x:%Y}":
        assert found.text == text
        assert found.notes == ((note,) if note else ())
    else:  # int takes "%" as a format of its own and refuses the rest
        assert found.text == text
        assert "Invalid format specifier" in found.notes[0]


def test_many_notes_are_counted() -> None:
    notes = interpolate(" ".join(f"{{name{i}}}" for i in range(30)), lookup).notes
    assert len(notes) == 9
    assert notes[-1] == "… and 22 more"


def test_a_table_gets_lines_of_its_own() -> None:
    table = "| q |\n| --- |\n| 0 |\n| 1 |\n| 2 |"
    assert interpolate("Sum {frame} up.", lookup).text == f"Sum \n\n{table}\n\n up."
    assert interpolate("Sum:\n{frame}\nup.", lookup).text == f"Sum:\n{table}\nup."


def test_pictures_are_refused_with_a_note() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from PIL import Image

    names = {"figure": Figure(), "axes": Figure().subplots(), "photo": Image.new("RGB", (2, 2))}
    found = interpolate("{figure} {axes} {photo}", lambda expression: names[expression])
    assert found.text == "{figure} {axes} {photo}"
    assert [note.partition(": ")[2] for note in found.notes] == [
        "it is a picture, and this model reads text only"
    ] * 3


def test_errors_of_cells_come_through_the_namespace() -> None:
    errors = ErrHistory()
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        errors.record(4, "1 / 0", error)
    names = {"Err": errors}
    found = interpolate("Why?\n{Err[4]}\n{Err[5]}", lambda expression: eval(expression, dict(names)))
    assert "ZeroDivisionError: division by zero" in found.text
    assert found.text.endswith("{Err[5]}")
    assert found.notes == ("{Err[5]} left alone: In[5] raised no error (errors of: In[4])",)


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted(_expression: str) -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interpolate("{x}", interrupted)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 20_000,
        "{a" * 20_000,
        "{a}" * 20_000,
        "\\frac{a}{b}" * 10_000,
        'f"' * 20_000,
        "'" * 50_000,
        "{((" * 5000,
    ],
)
def test_repetition_does_not_hang(text: str) -> None:
    def nothing(expression: str) -> object:
        raise NameError(expression)

    assert interpolate(text, nothing).text == text


def test_random_braces_never_raise_and_never_lose_text() -> None:
    import random

    draw = random.Random(11)
    parts = [
        "{",
        "}",
        "x",
        "a",
        " ",
        "\n",
        ":",
        "!r",
        "\\",
        "^",
        "_",
        '"',
        "'",
        "f",
        "(",
        ")",
        "[",
        "]",
        "$",
        ".format(",
        "é",
    ]

    def nothing(expression: str) -> object:
        raise NameError(expression)

    for _ in range(3000):
        text = "".join(draw.choices(parts, k=30))
        assert interpolate(text, nothing).text == text
        interpolate(text, lookup)


def test_pandas_is_not_imported_for_it() -> None:
    import subprocess

    code = (
        "import sys; from llm_magic.text.prompt import interpolate; interpolate('{x}', lambda e: [1]);"
        "assert not {'pandas', 'numpy', 'torch', 'PIL', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_of_numpy() -> None:
    values = {"v": np.float32(0.5), "w": np.arange(3)}
    assert interpolate("{v} {w}", lambda expression: values[expression]).text == "0.5 [0, 1, 2]"
