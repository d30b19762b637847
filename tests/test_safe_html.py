from __future__ import annotations

import random
import re

import pytest

from llm_magic.text.safe_html import (
    clean_html,
    code_to_html,
    escape_text,
    fences,
    markdown_to_html,
    text_to_html,
)
from tests.payloads import NAMED_PAYLOADS, PAYLOADS, violations

WRITERS = {
    "markdown": markdown_to_html,
    "html": clean_html,
    "text": text_to_html,
    "python": lambda text: code_to_html(text, "python"),
    "html code": lambda text: code_to_html(text, "html"),
    "unknown code": lambda text: code_to_html(text, "nonsense"),
    "line": escape_text,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("payload", NAMED_PAYLOADS)
def test_no_payload_survives(payload: str, writer: str) -> None:
    assert violations(WRITERS[writer](NAMED_PAYLOADS[payload])) == []


@pytest.mark.parametrize("writer", ["markdown", "html"])
def test_pairs_of_payloads_do_not_survive(writer: str) -> None:
    """One payload may open what another closes."""
    draw = random.Random(5)
    for _ in range(1500):
        text = draw.choice(["", "\n", "\n\n", "> ", "`"]).join(draw.choices(PAYLOADS, k=draw.randint(2, 4)))
        assert violations(WRITERS[writer](text)) == [], text


@pytest.mark.parametrize(
    "page",
    [
        "<img src=x>",
        "<p onclick=x>",
        '<a href="javascript:x">',
        '<a href="/logout">',
        "<p style='position:fixed'>",
        "<!-- x -->",
        "<svg>",
        "$\\href{x}{y}$",
        '<div class="jp-Dialog">',
        "<a data-commandlinker-command=x>",
    ],
)
def test_the_check_itself_finds_what_is_unsafe(page: str) -> None:
    assert violations(page)


def test_markdown_is_rendered() -> None:
    page = markdown_to_html("# Title\n\nSome **bold** text, ~~old~~.\n\n| a | b |\n|--:|---|\n| 1 | 2 |\n")
    assert "<h1>Title</h1>" in page
    assert "<strong>bold</strong>" in page
    assert "<s>old</s>" in page
    assert '<td style="text-align:right">1</td>' in page


def test_html_in_markdown_is_shown_as_text() -> None:
    assert "&lt;b&gt;x&lt;/b&gt;" in markdown_to_html("<b>x</b>")


def test_images_become_links() -> None:
    page = markdown_to_html("![a cat](https://example.org/cat.png)")
    assert (
        '<a href="https://example.org/cat.png" target="_blank" rel="noopener noreferrer">image: a cat</a>'
        in page
    )
    linked = markdown_to_html("[![a cat](https://example.org/cat.png)](https://example.org/)")
    assert linked.count("<a ") == 1
    assert "image: a cat" in linked
    assert '<a href="https://example.org/cat.png"' in clean_html('<img src="https://example.org/cat.png">')


def test_code_is_coloured_and_complete() -> None:
    code = 'def f(x):\n    return "<a>"  # twice\n'
    page = code_to_html(code, "python")
    assert "<span style=" in page
    text = re.sub(r"<[^>]*>", "", page)
    assert text == code.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert '<code class="language-python">' in markdown_to_html(f"```python\n{code}```")


@pytest.mark.parametrize(
    "formula",
    [
        "$a_1 * b_2 * c_3$",
        "$$x_1 \\\\ x_2$$",
        r"\(a_1 * b_2 * c\)",
        r"\[ \frac{a}{b} \]",
        "\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}",
        "$$\n- a\n+ b\n= c\n$$",
        "$\\{x \\mid x > 0\\}$",
    ],
)
def test_markdown_leaves_formulas_alone(formula: str) -> None:
    page = markdown_to_html(f"Text.\n\n{formula}\n\nMore.")
    assert formula.replace("&", "&amp;").replace(">", "&gt;") in page


def test_amounts_of_money_are_no_formula() -> None:
    page = markdown_to_html("It costs $5 and $6, or $7.")
    assert page.count("<span>$</span>") == 3


def test_unsafe_commands_read_the_same_but_are_no_formula() -> None:
    page = markdown_to_html(r"$\href{https://example.org}{x}$ and $\hrefs$")
    assert r"\<span></span>href" in page
    assert r"$\hrefs$" in page
    assert "`\\href`".strip("`") in markdown_to_html("`\\href`")


def test_fences_lists_code_in_order() -> None:
    text = "a\n```python\nx = 1\n```\n- b\n  ```Bash -x\n  ls\n  ```\n~~~\nopen"
    assert fences(text) == [("python", "x = 1\n"), ("bash", "ls\n"), ("", "open")]


def test_plain_text_keeps_its_lines() -> None:
    page = text_to_html("a\n  <b>\n$x$")
    assert "a\n  &lt;b&gt;\n$x$</pre>" in page


@pytest.mark.parametrize(
    "piece", ["\\(", "$$ ", "\\begin{a}", "$$\n", "![", "`a", "> ", "|a|\n|-|\n", "<a ", "***a"]
)
def test_repetition_does_not_hang(piece: str) -> None:
    assert markdown_to_html(piece * (20_000 // len(piece)))
