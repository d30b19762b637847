"""Model text as HTML that a page can hold: no script, nothing fetched, no command of the front end.

Two walls. markdown-it-py makes the HTML and passes no HTML of the model on; nh3 then keeps only
what the allow-list names. A third step is for MathJax, which reads the *text* of a page: commands
that link, style, load or redefine are kept out of formulas.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from llm_magic.harmless.terminal import sanitize

if TYPE_CHECKING:
    import nh3
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token
    from markdown_it.utils import EnvType, OptionsDict

ALLOWED_TAGS = frozenset(
    re.findall(
        r"\w+",
        "a abbr b blockquote br caption code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i ins kbd li mark "
        "ol p pre q s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul var",
    )
)
ALLOWED_SCHEMES = frozenset({"http", "https", "mailto"})
ALLOWED_ATTRIBUTES = {
    "a": {"href", "title"},
    "abbr": {"title"},
    "code": {"class"},
    "ol": {"start"},
    "span": {"style"},
    "td": {"colspan", "rowspan", "style"},
    "th": {"colspan", "rowspan", "style"},
}

# The front end's own editor colours; the fallbacks can be read on white and on black.
_COLOURS = {
    "Keyword": "var(--jp-mirror-editor-keyword-color, #2e8b57)",
    "Name.Builtin": "var(--jp-mirror-editor-builtin-color, #2e8b57)",
    "Name.Function": "var(--jp-mirror-editor-def-color, #3b7dd8)",
    "Name.Class": "var(--jp-mirror-editor-def-color, #3b7dd8)",
    "Literal.String": "var(--jp-mirror-editor-string-color, #c0504d)",
    "Literal.Number": "var(--jp-mirror-editor-number-color, #8a7000)",
    "Comment": "var(--jp-mirror-editor-comment-color, #767676)",
    "Operator": "var(--jp-mirror-editor-operator-color, #9a5fc7)",
}
_STYLES = frozenset(
    {f"color: {colour}" for colour in _COLOURS.values()}
    | {f"text-align:{side}" for side in ("left", "center", "right")}
)
_MARKDOWN_LIMIT = 200_000  # characters; no answer is that long, and some patterns take quadratic time
_HIGHLIGHT_LIMIT = 50_000  # characters; beyond it colours cost more than they tell

# Commands of MathJax and KaTeX that link, style, load, or change how later formulas of the whole
# page read. JupyterLab's "safe" extension filters some of them, other front ends none.
_UNSAFE_COMMAND = re.compile(
    r"\\(?=(?:"
    r"href|url|require|class|style|cssId|data|unicode|includegraphics|bbox|mmlToken|htmlClass|"
    r"htmlId|htmlStyle|htmlData|def|gdef|edef|xdef|let|futurelet|newcommand|renewcommand|"
    r"providecommand|newenvironment|renewenvironment|DeclareMathOperator|"
    r"DeclarePairedDelimiter|DeclarePairedDelimiters|DeclarePairedDelimitersX|"
    r"DeclarePairedDelimitersXPP|newtagform|renewtagform|usetagform|Newextarrow|definecolor|"
    r"mathtoolsset|setOptions|global"
    r")(?![A-Za-z]))"
)
_TAG = re.compile(r'(<(?:[^<>"]|"[^"]*")*>)')
_IMAGE = re.compile(r'<img(?:[^<>"]|"[^"]*")*>')


def markdown_to_html(text: str) -> str:
    """Markdown as clean HTML: tables, coloured code, formulas for MathJax; images become links.

    HTML in the Markdown is shown as text. The result holds only ``ALLOWED_TAGS`` and
    ``ALLOWED_ATTRIBUTES``, and links only to ``ALLOWED_SCHEMES``.
    """
    if len(text) > _MARKDOWN_LIMIT:
        return text_to_html(text)
    rendered = _markdown().render(sanitize(text))
    return _disarm_math(_cleaner(True).clean(rendered))


def clean_html(text: str) -> str:
    """HTML of a model without what the allow-list does not name; images become links.

    Classes and styles of the model are dropped with everything else.
    """
    with_images = _cleaner(False, images=True).clean(sanitize(text))
    return _disarm_math(_cleaner(False).clean(_IMAGE.sub(_image_link, with_images)))


def text_to_html(text: str) -> str:
    """Plain text, escaped, that keeps its line breaks and wraps long lines."""
    # MathJax leaves <pre> alone, so a formula in plain text stays plain.
    return f'<pre style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(sanitize(text))}</pre>'


def code_to_html(code: str, language: str = "") -> str:
    """Code in the colours of the front end's editor; plain where the language is unknown."""
    return f"<pre><code>{_highlight(sanitize(code), language, '')}</code></pre>"


def escape_text(text: str) -> str:
    """One line of text for the inside of an element, safe from HTML and from MathJax."""
    return _disarm_math(_lone_dollars(html.escape(sanitize(text))))


@cache
def _cleaner(ours: bool, images: bool = False) -> nh3.Cleaner:
    """The allow-list. ``ours``: the HTML was made here, so its classes and colours may stay."""
    import nh3

    attributes = {tag: set(names) for tag, names in ALLOWED_ATTRIBUTES.items()}
    if not ours:
        attributes = {tag: names - {"style", "class"} for tag, names in attributes.items()}
    if images:
        attributes["img"] = {"src", "alt"}
    return nh3.Cleaner(
        tags=ALLOWED_TAGS | ({"img"} if images else set()),
        attributes=attributes,
        attribute_filter=_attribute,
        url_schemes=set(ALLOWED_SCHEMES),
        url_relative="deny",  # a relative link would act on the Jupyter server as its user
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _attribute(_tag: str, name: str, value: str) -> str | None:
    if name == "style":
        return value if value in _STYLES else None
    if name == "class":
        return value if re.fullmatch(r"language-[\w.+#-]{1,40}", value) else None
    return value


def _image_link(match: re.Match[str]) -> str:
    # The input was serialized by nh3: attributes are double-quoted and escaped.
    fields = dict(re.findall(r'\s(src|alt)="([^"]*)"', match[0]))
    label = f"image: {fields.get('alt') or 'without a description'}"
    return f'<a href="{fields["src"]}">{label}</a>' if "src" in fields else f"<span>{label}</span>"


def _disarm_math(clean: str) -> str:
    """Put an element between a backslash and the name of an unsafe command, outside of code.

    MathJax joins no text across an element, so the formula that holds the command is shown as its
    source. Readers see the same characters.
    """
    parts, code_depth = _TAG.split(clean), 0
    for position, part in enumerate(parts):
        if position % 2:
            if re.match(r"</?(?:code|pre)[ >]", part):
                code_depth += -1 if part.startswith("</") else 1
        elif not code_depth:
            parts[position] = _UNSAFE_COMMAND.sub(r"\\<span></span>", part)
    return "".join(parts)


def _lone_dollars(escaped: str) -> str:
    # "$5 and $6" is no formula, but MathJax would pair the signs; alone in an element they cannot pair.
    return escaped.replace("$", "<span>$</span>")


# --- Markdown -------------------------------------------------------------------------------------


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt(
        "commonmark", {"html": False, "linkify": False, "typographer": False, "highlight": _highlight}
    )
    parser.enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "formula", _inline_formula)
    parser.block.ruler.before(
        "fence", "formula", _block_formula, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    parser.core.ruler.push("image_links", _images_to_links)
    parser.add_render_rule("formula", _render_formula)
    parser.add_render_rule("text", _render_text)
    return parser


@cache
def _block_parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


def fences(text: str) -> list[tuple[str, str]]:
    """``(language, code)`` of every fenced code block of a Markdown text, in order."""
    blocks = (token for token in _block_parser().parse(text) if token.type == "fence")
    return [(token.info.split()[0].lower() if token.info.split() else "", token.content) for token in blocks]


def _render_formula(
    _renderer: RendererHTML, tokens: Sequence[Token], index: int, _options: OptionsDict, _env: EnvType
) -> str:
    escaped = html.escape(tokens[index].content, quote=False)
    return f"<div>{escaped}</div>\n" if tokens[index].block else escaped


def _render_text(
    _renderer: RendererHTML, tokens: Sequence[Token], index: int, _options: OptionsDict, _env: EnvType
) -> str:
    return _lone_dollars(html.escape(tokens[index].content, quote=False))


# Pandoc's rule for single dollars: no space inside, no digit after.
_INLINE_FORMULAS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(?!\$).{1,5000}?\$\$",
        r"\$(?![\s$])(?:\\.|[^$\\]){0,2000}?(?<![\s\\])\$(?![\d$])",
        r"\\\(.{1,5000}?\\\)",
        r"\\\[.{1,5000}?\\\]",
        r"\\begin\{([A-Za-z]{1,20}\*?)\}.{0,5000}?\\end\{\1\}",
    )
)
_BLOCK_OPENERS = (("$$", re.compile(r"\$\$")), ("\\[", re.compile(r"\\\]")))
_ENVIRONMENT = re.compile(r"\\begin\{([A-Za-z]{1,20}\*?)\}")


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """A formula inside of a paragraph, which Markdown must not touch."""
    if state.src[state.pos] not in "$\\":
        return False
    for pattern in _INLINE_FORMULAS:
        match = pattern.match(state.src, state.pos, state.posMax)
        if match:
            if not silent:
                state.push("formula", "", 0).content = match[0]
            state.pos = match.end()
            return True
    return False


def _block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A displayed formula on lines of its own, whose lines may look like lists or headings."""
    if state.is_code_block(start):
        return False
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    closer = _closer(first)
    if closer is None:
        return False
    offset = 2 if first.startswith(("$$", "\\[")) else 0
    for line in range(start, end):
        text = state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]]
        match = closer.search(text, offset if line == start else 0)
        if match:
            # Text after the formula makes it part of a paragraph.
            return not text[match.end() :].strip(" .,;") and _push_formula(state, start, line, silent)
    return False


def _closer(first_line: str) -> re.Pattern[str] | None:
    for opener, closer in _BLOCK_OPENERS:
        if first_line.startswith(opener):
            return closer
    environment = _ENVIRONMENT.match(first_line)
    return re.compile(re.escape(f"\\end{{{environment[1]}}}")) if environment else None


def _push_formula(state: StateBlock, start: int, last: int, silent: bool) -> bool:
    if not silent:
        token = state.push("formula", "div", 0)
        token.content = state.getLines(start, last + 1, state.blkIndent, False)
        token.block, token.map = True, [start, last + 1]
        state.line = last + 1
    return True


def _images_to_links(state: StateCore) -> None:
    for token in state.tokens:
        if token.children:
            token.children = _without_images(token.children)


def _without_images(children: Sequence[Token]) -> list[Token]:
    from markdown_it.token import Token

    replaced: list[Token] = []
    open_links = 0
    for child in children:
        open_links += {"link_open": 1, "link_close": -1}.get(child.type, 0)
        if child.type != "image":
            replaced.append(child)
            continue
        label = Token("text", "", 0)
        label.content = f"image: {child.content or 'without a description'}"
        if open_links:  # links do not nest
            replaced.append(label)
            continue
        opening = Token("link_open", "a", 1)
        opening.attrs = {"href": str(child.attrs.get("src", ""))}
        replaced += [opening, label, Token("link_close", "a", -1)]
    return replaced


def _highlight(code: str, language: str, _attributes: str) -> str:
    """Escaped code with colours; markdown-it's ``highlight`` signature."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language or len(code) > _HIGHLIGHT_LIMIT:
        return html.escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return html.escape(code)
    return "".join(_coloured(str(kind), text) for kind, text in lexer.get_tokens(code))


def _coloured(kind: str, text: str) -> str:
    escaped = html.escape(text)
    for name, colour in _COLOURS.items():
        if kind.startswith(f"Token.{name}"):
            return f'<span style="color: {colour}">{escaped}</span>'
    return escaped
