"""Reads a page's tables, ids and links, for tests of what it says."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: each tag with its attributes, in their order.
        tables: caption → lines of cells: what each shows.
        numbers: the values of `<data>` in each table, by line: caption → lines of numbers.
        text: all text that is shown.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.tables, self.numbers, self.text = [], {}, {}, ""
        self._open: list[str] = []
        self._caption, self._lines, self._values, self._cell = "", [], [], None
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._caption, self._lines, self._values = "", [], []
        elif tag == "tr":
            self._lines.append([])
            self._values.append([])
        elif tag in ("th", "td"):
            self._cell = []
        elif tag == "data":
            self._values[-1].append(float(dict(attrs)["value"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes another tag"
        if tag in ("th", "td") and self._cell is not None:
            self._lines[-1].append(" ".join(" ".join(self._cell).split()))
            self._cell = None
        elif tag == "table":
            self.tables[self._caption.strip()] = self._lines
            self.numbers[self._caption.strip()] = self._values

    def handle_data(self, data):
        if "style" in self._open[-1:]:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        if self._cell is not None:
            self._cell.append(data)

    def all(self, tag: str) -> list[dict]:
        """The attributes of each tag of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]
