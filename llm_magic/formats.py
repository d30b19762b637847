"""The built-in ``-f`` formats: a finished answer as a bundle that is safe to save in a notebook.

Every bundle is ``text/plain`` and ``text/html``, and ends with the footer: how fast the answer came,
where the model was, and why the answer ended.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llm_magic.harmless.terminal import sanitize
from llm_magic.hookspecs import Format, hookimpl
from llm_magic.result import Footprint, Generation
from llm_magic.text.safe_html import (
    clean_html,
    code_to_html,
    escape_text,
    fences,
    markdown_to_html,
    text_to_html,
)
from llm_magic.units import format_bytes, format_rate, format_seconds

_ENDINGS = {"stopped": "stopped by you", "interrupted": "interrupted by you", "error": "ended by an error"}
_LIMITS = {
    "tokens": "cut at the token limit",
    "context": "cut where the context is full",
    "time": "cut at the time limit",
}
_MUTED = "margin-top:0.5em;font-size:85%;color:var(--jp-ui-font-color2, #767676)"
_ONE_TOKEN = 1.05  # tokens per sweep; below, they came one by one
_PYTHON = ("python", "py", "python3", "ipython", "ipython3", "pycon")


# --- The footer -----------------------------------------------------------------------------------


def footer_text(generation: Generation) -> str:
    """One line about how the answer was made; empty when nothing is known.

    Why the answer ended when it was cut short, tokens and speeds, the placement, what moved for a
    token and how near that came to the hardware's limit, and what happened on the way: all of
    ``generation.footprint``, as far as it is worth a word.
    """
    return sanitize(" · ".join(_footer_parts(generation))).replace("\n", " ")


def footer_html(generation: Generation) -> str:
    """``footer_text`` as a small muted line; empty when that is empty."""
    line = escape_text(footer_text(generation))
    return f'<div style="{_MUTED}">{line}</div>' if line else ""


def _footer_parts(generation: Generation) -> Iterator[str]:
    footprint = generation.footprint
    if ending := _ending(generation):
        yield ending
    if footprint.generated_tokens or footprint.prompt_tokens:
        yield from _speed_parts(footprint)
    yield from _placement_parts(footprint)
    yield from footprint.notes
    if footprint.seed is not None:
        yield f"seed {footprint.seed}"


def _ending(generation: Generation) -> str:
    reason, line = generation.finish_reason, generation.footprint.continued_by
    words = _LIMITS[generation.footprint.limit] if reason == "length" else _ENDINGS.get(reason, "")
    return f"{words}: {line} continues it" if line else words


def _speed_parts(footprint: Footprint) -> Iterator[str]:
    yield f"{footprint.generated_tokens:,} token{'s' if footprint.generated_tokens != 1 else ''}"
    if footprint.generation_tps:
        yield format_rate(footprint.generation_tps)
    if footprint.tokens_per_sweep > _ONE_TOKEN:
        yield f"{footprint.tokens_per_sweep:.1f} tokens per sweep"
    if footprint.first_token_s:
        yield f"first token after {format_seconds(footprint.first_token_s)}"
    if footprint.cached_tokens:
        yield f"{footprint.cached_tokens:,} of {footprint.prompt_tokens:,} prompt tokens reused"


def _placement_parts(footprint: Footprint) -> Iterator[str]:
    if footprint.placement:
        yield footprint.placement
    if footprint.moved_bytes:
        yield f"{format_bytes(footprint.moved_bytes)} moved per token"
    if footprint.bound_by:
        yield f"bound by {footprint.bound_by}"
    if footprint.moved_bytes and footprint.limit_share:
        yield f"{100 * footprint.limit_share:.0f} % of the limit"


# --- The formats ----------------------------------------------------------------------------------


def bundle(generation: Generation) -> dict[str, Any]:
    """The bundle of the built-in format that ``generation.display_format`` names, else of Markdown."""
    chosen = next((f for f in BUILT_IN if f.name == generation.display_format), BUILT_IN[0])
    return dict(chosen.bundle(generation))


def extract_code(text: str, language: str = "python") -> str:
    """The code of an answer, for a new cell; it is never run here.

    Fenced blocks in ``language`` (and those that name none) are joined; blocks in other languages
    count only when there is no such block. An answer without fences is code when it parses as
    Python. Empty when there is no code.
    """
    blocks = fences(text)
    wanted = (language, "", *(_PYTHON if language in _PYTHON else ()))
    chosen = [code for name, code in blocks if name in wanted] or [code for _, code in blocks]
    if chosen:
        return sanitize("\n\n".join(code.strip("\n") for code in chosen))
    return sanitize(text).strip() if not blocks and _is_python(text) else ""


def extract_json(text: str) -> Any:
    """The first JSON value of an answer: all of it, a fenced block, or an object or array in prose.

    Raises
    ------
    ValueError
        When there is none; the message says where the most promising candidate breaks.
    """
    candidates = [text, *(code for name, code in fences(text) if name in ("json", ""))]
    failures = []
    for candidate in candidates:
        try:
            return _strict_json(candidate)
        except (ValueError, RecursionError) as error:
            failures.append(error)
    found, value = _json_in_prose(text)
    if found:
        return value
    raise ValueError(str(failures[-1]))


def _markdown(generation: Generation) -> Mapping[str, Any]:
    return _finished(generation, str(generation), markdown_to_html(generation))


def _text(generation: Generation) -> Mapping[str, Any]:
    return _finished(generation, str(generation), text_to_html(generation))


def _code(generation: Generation) -> Mapping[str, Any]:
    code = extract_code(generation)
    if not code:
        note = "There is no code in this answer."
        return _finished(generation, str(generation), markdown_to_html(generation), note)
    whole = f"<details><summary>Whole answer</summary>{markdown_to_html(generation)}</details>"
    language = next((name for name, _ in fences(generation) if name), "python")
    prose = "" if code.strip() == generation.strip() else whole
    return _finished(generation, code, code_to_html(code, language) + prose)


def _json(generation: Generation) -> Mapping[str, Any]:
    try:
        pretty = json.dumps(extract_json(generation), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        note = f"This answer is no JSON: {error}"
        return _finished(generation, str(generation), text_to_html(generation), note)
    return _finished(generation, pretty, code_to_html(pretty, "json"))


def _html(generation: Generation) -> Mapping[str, Any]:
    pages = [code for name, code in fences(generation) if name in ("html", "xhtml")]
    if not pages and not re.search(r"<[A-Za-z/!]", generation):
        return _markdown(generation)
    return _finished(generation, str(generation), clean_html("\n".join(pages) or generation))


def _math(generation: Generation) -> Mapping[str, Any]:
    blocks = [code for name, code in fences(generation) if name in ("latex", "tex", "math", "")]
    source = "\n\n".join(blocks) or str(generation)
    return _finished(generation, source.strip(), markdown_to_html(_as_formulas(source)))


def _as_formulas(source: str) -> str:
    """LaTeX with its delimiters; a source that has none is one displayed formula a paragraph."""
    if re.search(r"\$|\\\(|\\\[|\\begin\{", source):
        return source
    paragraphs = (p.strip() for p in re.split(r"\n\s*\n", source))
    return "\n\n".join(f"$$\n{p}\n$$" if re.search(r"[\\^_=]", p) else p for p in paragraphs if p)


def _finished(generation: Generation, text: str, page: str, note: str = "") -> dict[str, str]:
    lines = [line for line in (sanitize(note), footer_text(generation)) if line]
    muted = f'<div style="{_MUTED}">{escape_text(note)}</div>' if note else ""
    return {
        "text/plain": "\n\n".join((sanitize(text), *lines)),
        "text/html": page + muted + footer_html(generation),
    }


def _is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    # One word parses as Python too; an answer is code when it does something.
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in tree.body)


def _strict_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_in_prose(text: str) -> tuple[bool, Any]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    starts = [match.start() for match in re.finditer(r"[{\[]", text)][:200]
    for start in starts:
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if value and isinstance(value, dict | list):
            return True, value
    return False, None


BUILT_IN = (
    Format("markdown", "Formatted text, tables, coloured code and formulas (the default).", _markdown),
    Format("text", "Plain text, exactly as the model wrote it.", _text),
    Format("code", "The code blocks; they also go to a new cell, and never run by themselves.", _code),
    Format("json", "The JSON in the answer, checked and indented.", _json),
    Format("html", "HTML without scripts, styles and images.", _html),
    Format("math", "LaTeX formulas.", _math),
)


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """Register the built-in formats."""
    for item in BUILT_IN:
        register(item)
