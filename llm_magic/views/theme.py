"""Colours and patterns of the placement views, as inline CSS.

A saved notebook loses style sheets and classes where it is shown elsewhere, so every element
carries its own style. Tier colours have a contrast of 3:1 or more against white and against
black-ish backgrounds, and 4.5:1 under white text, so one palette serves light and dark. What must
differ comes from the host's variables, or from the system's colour scheme where there are none.
A host that drops ``background-image`` still shows the colours.
"""

from __future__ import annotations

from llm_magic.text.safe_html import escape_text as escape

TEXT = "var(--jp-ui-font-color1,var(--vscode-editor-foreground,light-dark(#1f2328,#e6e9ee)))"
MUTED = "var(--jp-ui-font-color2,var(--vscode-descriptionForeground,light-dark(#5b6673,#9aa5b1)))"
LINE = "var(--jp-border-color2,var(--vscode-panel-border,light-dark(#d3d9e0,#353c45)))"
PAGE = "var(--jp-layout-color0,var(--vscode-editor-background,light-dark(#ffffff,#111418)))"
CARD = "var(--jp-layout-color1,var(--vscode-editorWidget-background,light-dark(#f6f7f9,#191d23)))"
CODE = "var(--jp-code-font-family,ui-monospace,SFMono-Regular,Menlo,Consolas,monospace)"
BAD_TEXT = "var(--jp-error-color1,var(--vscode-errorForeground,light-dark(#c62828,#ff7b72)))"
GOOD, BAD, CARE = "#1a7f5a", "#d1242f", "#a8680e"

_VEIL = "rgba(255,255,255,.26)"
_STRIPES = {
    "diagonal": f"repeating-linear-gradient(45deg,{_VEIL} 0 3px,transparent 3px 8px)",
    "flat": f"repeating-linear-gradient(0deg,{_VEIL} 0 2px,transparent 2px 6px)",
    "upright": f"repeating-linear-gradient(90deg,{_VEIL} 0 2px,transparent 2px 6px)",
    "dots": f"radial-gradient({_VEIL} 1.2px,transparent 1.7px)",
    "grid": f"repeating-linear-gradient(0deg,{_VEIL} 0 1px,transparent 1px 7px),"
    f"repeating-linear-gradient(90deg,{_VEIL} 0 1px,transparent 1px 7px)",
    "back": f"repeating-linear-gradient(135deg,{_VEIL} 0 2px,transparent 2px 5px)",
}
_FILLS = {
    "gpu": ("#1a7f5a", ""),
    "split": ("#1a7f5a", "diagonal"),
    "ram": ("#2f6fd6", ""),
    "ram-streamed": ("#2f6fd6", "diagonal"),
    "looked-up": ("#2f6fd6", "grid"),
    "disk": ("#a8680e", "flat"),
    "kept": ("#a8680e", "back"),
    "idle": ("#6a7280", ""),
    "draft": ("#1a7f5a", "dots"),
    "kv_cache": ("#7c4ddb", "dots"),
    "activations": ("#c43d70", "upright"),
    "slots": ("#0b7f97", "diagonal"),
    "buffers": ("#5f6b78", "upright"),
}


def fill(name: str) -> str:
    """CSS of a filled area; colour and pattern are separate so that one survives without the other."""
    if name in ("other", "reserve"):
        ink = "rgba(128,137,147,.75)" if name == "other" else "rgba(128,137,147,.38)"
        angle, step = ("135deg", 6) if name == "other" else ("45deg", 8)
        return f"background-image:repeating-linear-gradient({angle},{ink} 0 2px,transparent 2px {step}px)"
    if name == "free":
        return ""
    colour, pattern = _FILLS[name]
    image = f";background-image:{_STRIPES[pattern]}" if pattern else ""
    size = ";background-size:6px 6px" if pattern == "dots" else ""
    return f"background-color:{colour}{image}{size}"


def frame(content: str) -> str:
    """The outermost element of a view."""
    return (
        f'<div style="color-scheme:light dark;background:{PAGE};color:{TEXT};padding:12px 14px;max-width:1040px;'
        f'font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);border-radius:6px">{content}</div>'
    )


def title(name: str, facts: str) -> str:
    """Heading of a view; both texts are escaped here."""
    return (
        f'<div style="font-size:15px;margin-bottom:6px"><b>{escape(name)}</b> '
        f'<span style="color:{MUTED};font-size:13px">{escape(facts)}</span></div>'
    )


def chip(text: str, colour: str = "") -> str:
    """A fact in a rounded box; the text is escaped here."""
    edge = f"border:1px solid {colour or LINE}"
    weight = ";font-weight:600" if colour else ""
    return (
        f'<span style="display:inline-block;{edge}{weight};border-radius:999px;padding:1px 10px;'
        f'margin:0 6px 4px 0;background:{CARD}">{escape(text)}</span> '
    )
