"""Pages that are safe to open: parsed, and looked at."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

from support.compiling import TRAINING, compile_llama

EVIL = "<script>alert(1)</script>&'\"><img src=x onerror=alert(2)>{{ 7 * 7 }}"
VOID = {"meta"}
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "div", "h1", "h2", "h3", "p",
    "b", "a", "span", "ul", "li", "dl", "dt", "dd", "table", "tr", "th", "td", "details", "summary", "pre", "code",
    "figure", "figcaption", "svg", "g", "path", "rect", "circle", "text",
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """A page whose elements open and close in order, with its texts and attributes by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def checked(text: str) -> Page:
    """A page that loads nothing, runs nothing, and whose pictures have names and finite numbers."""
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= ALLOWED
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(set(ids)) == len(ids)
    for tag, values in page.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in values)
        assert "href" not in values or (values["href"][0] == "#" and values["href"][1:] in ids)
        if tag == "svg":
            assert values.get("aria-hidden") == "true" or (values["role"] == "img" and values["aria-label"])
        if tag in ("path", "rect", "circle", "text"):
            geometry = [values.get(name, "") for name in ("d", "x", "y", "cx", "cy", "r", "width", "height")]
            assert not re.search("nan|inf|e", " ".join(geometry))
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles and not any(word in style for style in styles for word in ("url(", "@import", "http", "<", "&"))
    return page


def export_llama(folder: Path) -> Path:
    """A trained model, exported with what `quantize` knows besides."""
    perplexity = {"values": {"float": 12.5, "quantized": 13.25}, "text": "a text", "tokens": 100, "context": 64}
    provenance = {"command": "teq-graph quantize llama -o 'my out'", "perplexity": perplexity}
    return compile_llama(training=TRAINING).export_onnx(folder / "out", provenance=provenance)
