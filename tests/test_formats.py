from __future__ import annotations

import json
import pickle
from dataclasses import replace

import nbformat
import pytest
from nbconvert import HTMLExporter

from llm_magic.formats import BUILT_IN, extract_code, extract_json, footer_html, footer_text, register_formats
from llm_magic.hookspecs import Format
from llm_magic.result import Footprint, Generation, Turn
from tests.payloads import NAMED_PAYLOADS, PAYLOADS, violations

FORMATS = [item.name for item in BUILT_IN]
FOOTPRINT = Footprint(
    model="starter",
    prompt_tokens=120,
    cached_tokens=96,
    generated_tokens=128,
    prompt_tps=500.0,
    generation_tps=31.42,
    first_token_s=0.084,
    total_s=4.2,
    placement="60 % RAM · 40 % disk",
    bound_by="disk, 0.8 GB/s",
)


def answer(text: str, output_format: str = "markdown", reason: str = "stop") -> Generation:
    return Generation(text, reason, FOOTPRINT, Turn("question"), output_format)  # type: ignore[arg-type]


def bundle(text: str, output_format: str) -> dict[str, str]:
    return Generation(text, display_format=output_format)._repr_mimebundle_()


# --- The footer -----------------------------------------------------------------------------------


def footer(**facts: object) -> str:
    return footer_text(Generation("x", "stop", replace(FOOTPRINT, **facts)))  # type: ignore[arg-type]


def test_the_footer_says_what_moved_and_how_near_the_limit_that_came() -> None:
    assert footer(moved_bytes=12 << 20, limit_share=0.94).endswith(
        " · 60 % RAM · 40 % disk · 12.0 MiB moved per token · bound by disk, 0.8 GB/s · 94 % of the limit"
    )
    assert "moved" not in footer(limit_share=0.94)
    assert "of the limit" not in footer(limit_share=0.94)  # where nothing moves there is nothing to watch
    assert "of the limit" not in footer(moved_bytes=12 << 20)


@pytest.mark.parametrize(("tokens", "says"), [(2.34, True), (1.06, True), (1.04, False), (0.0, False)])
def test_the_footer_counts_tokens_per_sweep_where_it_is_more_than_one(tokens: float, says: bool) -> None:
    assert (f"31.4 tok/s · {tokens:.1f} tokens per sweep · first" in footer(tokens_per_sweep=tokens)) == says


def test_the_footer_says_what_happened_on_the_way() -> None:
    text = footer(notes=("layers.3 moved to disk: memory ran out", "a\nb\x1b[31m"))
    assert " · layers.3 moved to disk: memory ran out · a b" in text
    assert "\x1b" not in text


# --- Safety ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("payload", NAMED_PAYLOADS)
def test_every_payload_in_every_format_is_harmless(payload: str, output_format: str) -> None:
    text = NAMED_PAYLOADS[payload]
    hostile = replace(FOOTPRINT, model=text, placement=text, bound_by=text, notes=(text,))
    shown = Generation(text, "length", hostile, Turn(text), output_format)._repr_mimebundle_()
    assert set(shown) == {"text/plain", "text/html"}
    assert violations(shown["text/html"]) == []
    assert "\x1b" not in shown["text/plain"]


@pytest.mark.parametrize("output_format", FORMATS)
def test_fenced_payloads_are_harmless(output_format: str) -> None:
    for payload in PAYLOADS:
        for language in ("html", "json", "latex", "python", ""):
            assert violations(bundle(f"```{language}\n{payload}\n```", output_format)["text/html"]) == []


def test_an_exported_notebook_holds_nothing_that_acts() -> None:
    """What nbconvert makes of our outputs: cut out between two marks, and looked at."""
    outputs = [
        nbformat.v4.new_output("display_data", data={"text/plain": "mark", "text/html": "<p>mark</p>"}),
        *(
            nbformat.v4.new_output("display_data", data=bundle(payload, output_format))
            for payload in PAYLOADS
            for output_format in FORMATS
        ),
        nbformat.v4.new_output("display_data", data={"text/plain": "mark", "text/html": "<p>mark</p>"}),
    ]
    for output in outputs:
        # What a file cannot hold must be gone already.
        json.dumps(output["data"]).encode()
        output["data"]["text/html"].encode()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=outputs)])
    page, _ = HTMLExporter(sanitize_html=False).from_notebook_node(notebook)
    ours = page.split("<p>mark</p>")[1]
    assert ours.count("image: ") > 10
    assert [found for found in violations(ours) if not _is_of_nbconvert(found)] == []


def _is_of_nbconvert(found: str) -> bool:
    """The boxes that nbconvert puts around each output."""
    return found.startswith(
        ("div class='jp-", "div tabindex=", "div data-mime-type=", "div class='output", "div class=''")
    )


# --- The formats ----------------------------------------------------------------------------------


def test_all_formats_register() -> None:
    registered: list[Format] = []
    register_formats(registered.append)
    assert [item.name for item in registered] == ["markdown", "text", "code", "json", "html", "math"]
    assert all(item.help for item in registered)


def test_an_unknown_format_is_shown_as_markdown() -> None:
    assert bundle("**x**", "of a plugin that is gone") == bundle("**x**", "markdown")


def test_markdown_keeps_the_source_as_plain_text() -> None:
    shown = bundle("# T\n\n**x**", "markdown")
    assert shown["text/plain"] == "# T\n\n**x**"
    assert "<h1>T</h1>" in shown["text/html"]


def test_text_is_not_rendered() -> None:
    assert "# T &lt;b&gt;" in bundle("# T <b>", "text")["text/html"]


def test_code_shows_the_code_and_folds_the_rest() -> None:
    shown = bundle("Sure:\n\n```python\nprint(1)\n```\n", "code")
    assert shown["text/plain"] == "print(1)"
    assert "<details><summary>Whole answer</summary><p>Sure:</p>" in shown["text/html"]


def test_an_answer_without_code_says_so() -> None:
    shown = bundle("I would rather not.", "code")
    assert shown["text/plain"] == "I would rather not.\n\nThere is no code in this answer."
    assert "There is no code" in shown["text/html"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```\nthen\n```py\nb = 2\n```", "a = 1\n\nb = 2"),
        ("```bash\nls\n```\n```python\na\n```", "a"),
        ("```bash\nls\n```", "ls"),
        ("```\na = 1\n```", "a = 1"),
        ("1. do\n\n   ```python\n   if a:\n       b()\n   ```", "if a:\n    b()"),
        ("```python\nx = 1\nunfinished(", "x = 1\nunfinished("),
        ("import os\nprint(os.name)", "import os\nprint(os.name)"),
        ("print(1)", "print(1)"),
        ("Paris", ""),
        ("Paris is the capital.", ""),
        ("", ""),
    ],
)
def test_code_of_an_answer(text: str, code: str) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
        ("42", 42),
        ('Here:\n```json\n{"a": [1]}\n```\nDone.', {"a": [1]}),
        ('The result is {"a": {"b": null}} as asked.', {"a": {"b": None}}),
        ("See [the docs](x): [1, 2]", [1, 2]),
    ],
)
def test_json_of_an_answer(text: str, value: object) -> None:
    assert extract_json(text) == value


@pytest.mark.parametrize("text", ["", "no", '{"a": 1', "{'a': 1}", "NaN", "[" * 100_000])
def test_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        extract_json(text)
    assert "This answer is no JSON" in bundle(text, "json")["text/plain"]


def test_code_for_a_new_cell_hides_nothing() -> None:
    """Bidirectional overrides make code read as something else than it does."""
    assert extract_code("```python\nx = '\u202eadmin\u2066'\x1b[2J\n```") == "x = 'admin'[2J"


def test_json_is_indented() -> None:
    assert bundle('{"é":[1]}', "json")["text/plain"] == '{\n  "é": [\n    1\n  ]\n}'


def test_html_is_cleaned_and_taken_from_its_fence() -> None:
    page = bundle("Here:\n```html\n<h2>T</h2><script>x()</script><p onclick=y>z</p>\n```", "html")[
        "text/html"
    ]
    assert page == "<h2>T</h2><p>z</p>\n"
    assert "<strong>" in bundle("**no tags**", "html")["text/html"]


@pytest.mark.parametrize(
    "text", [r"\frac{a}{b} = c", "```latex\n\\frac{a}{b} = c\n```", "$$\n\\frac{a}{b} = c\n$$"]
)
def test_math_is_one_formula_for_mathjax(text: str) -> None:
    page = bundle(text, "math")["text/html"]
    assert page.split() == ["<div>$$", r"\frac{a}{b}", "=", "c", "$$</div>"]


# --- The footer -----------------------------------------------------------------------------------


def test_footer_says_how_the_answer_was_made() -> None:
    assert footer_text(answer("x")) == (
        "128 tokens · 31.4 tok/s · first token after 84 ms · 96 of 120 prompt tokens reused"
        " · 60 % RAM · 40 % disk · bound by disk, 0.8 GB/s"
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("length", "cut at the token limit"),
        ("stopped", "stopped by you"),
        ("interrupted", "interrupted by you"),
        ("error", "ended by an error"),
    ],
)
def test_footer_says_why_an_answer_is_partial_and_what_continues_it(reason: str, words: str) -> None:
    partial = answer("x", reason=reason)
    assert footer_text(partial).startswith(f"{words} · 128 tokens")
    continued = footer_text(partial.with_continuation("%%llm -c --chat 'a b'"))
    assert continued.startswith(f"{words}: %%llm -c --chat 'a b' continues it · ")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("tokens", "cut at the token limit"),
        ("context", "cut where the context is full"),
        ("time", "cut at the time limit"),
    ],
)
def test_footer_says_which_limit_cut_an_answer(limit: str, words: str) -> None:
    assert footer_text(Generation("x", "length", Footprint(limit=limit))) == words  # type: ignore[arg-type]


def test_footer_is_part_of_both_displays() -> None:
    for output_format in FORMATS:
        generation = answer("x", output_format)
        shown = generation._repr_mimebundle_()
        assert shown["text/plain"].endswith(footer_text(generation))
        assert shown["text/html"].endswith(footer_html(generation))


def test_nothing_known_no_footer() -> None:
    assert footer_text(Generation("x")) == footer_html(Generation("x")) == ""


# --- Generation -----------------------------------------------------------------------------------


def test_a_generation_is_a_string_that_pickles() -> None:
    generation = answer("hello world", "json", "length")
    again = pickle.loads(pickle.dumps(generation))
    assert type(again) is Generation
    assert (again, again.footprint, again.finish_reason) == ("hello world", FOOTPRINT, "length")
    assert (again.turn, again.display_format, again.is_partial) == (Turn("question"), "json", True)
    assert type(generation[:5]) is str
    assert generation[:5] + "!" == "hello!"
    assert f"{generation}" == "hello world"
    assert type(str(generation)) is str
