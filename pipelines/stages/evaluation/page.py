"""One HTML file that needs nothing else: pictures inside it, no scripts, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
figure{margin:1rem 0}
img{max-width:100%;height:auto}
figcaption,.note{color:#555}
"""
# Nothing may be fetched or run, whatever stands in the texts.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        header = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = "\n".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table>\n<tr>{header}</tr>\n{rows}\n</table>"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A PNG and what it shows."""

    png: bytes
    caption: str

    def html(self) -> str:
        data, text = base64.b64encode(self.png).decode(), escape(self.caption)
        return (
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A heading, a note on how to read what follows, tables and figures."""

    title: str
    note: str
    parts: Sequence[Table | Figure]

    def html(self) -> str:
        parts = "\n".join(part.html() for part in self.parts)
        return f'<h2>{escape(self.title)}</h2>\n<p class="note">{escape(self.note)}</p>\n{parts}'


def render(title: str, note: str, chapters: Sequence[Chapter]) -> str:
    """The whole page."""
    body = "\n".join(chapter.html() for chapter in chapters)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>\n{body}\n</body>\n</html>\n'
    )
