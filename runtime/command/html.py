"""HTML of nested elements, escaped where it is made, and a page that needs nothing beside itself."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

VOID = frozenset({"img", "link", "meta", "source"})
"""Elements without an end; those of SVG have one."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing that is not in it."""


class Html(str):
    """Text that is HTML already; any other text is escaped before it becomes a part of it."""

    __slots__ = ()


def joined(*parts: str) -> Html:
    """``parts`` one after another."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def element(name: str, /, *content: str, **attributes: object) -> Html:
    """An element around ``content``; a Python word as in ``class_`` and ``stroke_width`` names ``stroke-width``."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{joined(*content)}</{name}>")


def data_uri(kind: str, content: bytes) -> str:
    """``content`` of the media type ``kind``, as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(frame: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def page(title: str, *content: str) -> Html:
    """A whole document, with the style of ``report.css``."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *content))
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def section(title: str, *content: Html) -> Iterator[Html]:
    """``content`` under ``title``, if there is any."""
    if content:
        yield element("section", element("h2", title), *content)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Html]:
    """``rows`` under ``columns``, if there are any."""
    if rows:
        head = element("tr", *(element("th", column) for column in columns)) if any(columns) else ""
        body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
        yield element("div", element("table", head, *body), class_="wide")
