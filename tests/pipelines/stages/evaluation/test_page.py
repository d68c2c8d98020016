"""The HTML page: it needs nothing from elsewhere, and text stays text."""

import base64
import re
from html.parser import HTMLParser

from pipelines.stages.evaluation.page import Chapter, Figure, Table, render

EVIL = "<script>alert('a')</script> & \"more\""
PNG = b"\x89PNG and so on"


class Elements(HTMLParser):
    """Collects tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> str:
    """A page that says something evil in every place for text."""
    parts = [Table(header=[EVIL], rows=[[EVIL]]), Figure(png=PNG, caption=EVIL)]
    return render(EVIL, EVIL, [Chapter(title=EVIL, note=EVIL, parts=parts)])


def test_text_is_escaped_everywhere() -> None:
    """No text becomes an element; all of it can be read."""
    elements = Elements(page())
    assert "script" not in [tag for tag, _ in elements.tags]
    assert elements.text.count(EVIL) == 8  # title twice, note, chapter's two, table's two, caption
    assert next(attrs for tag, attrs in elements.tags if tag == "img")["alt"] == EVIL


def test_pictures_lie_inside() -> None:
    """The bytes are in the page, and nothing is fetched from anywhere."""
    elements = Elements(page())
    (source,) = (attrs["src"] for tag, attrs in elements.tags if tag == "img")
    assert source is not None
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in elements.tags}
    assert not re.search(r"https?://|url\(|@import", page())
    policy = next(attrs["content"] for _, attrs in elements.tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
