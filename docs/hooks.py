"""What mkdocs.yml cannot say: pages that are kept outside `docs`, and links to files that are no pages."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

_LOGGER = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parents[1]
# path in the repository → page
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"examples/{path.name}": f"examples/{path.name}.md" for path in sorted((ROOT / "examples").glob("*.*"))},
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
}
_LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are kept outside `docs`."""
    for path, page in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.startswith("examples/"):
            text = f"# {path}\n\n```{path.rpartition('.')[2]}\n{text}```\n"
        if path.startswith("notebooks/"):
            text = from_notebook(json.loads(text), path)
        if page == "index.md":
            text = f"---\nhide: [navigation]\n---\n{text}"
        files.append(File.generated(config, page, content=text))
    return files


def from_notebook(notebook: dict[str, Any], path: str) -> str:
    """A notebook as a page: its texts, its code, and what each cell prints."""
    found = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found.append(source)
            continue
        found.append(f"```python\n{source}\n```")
        printed = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
        if printed:
            found.append("```text\n" + "".join(map("".join, printed)).rstrip() + "\n```")
    title, *others = found
    return "\n\n".join([title, f"The notebook is `{path}` in the repository.", *others]) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site; those to files that are no pages become plain text."""
    name = page.file.src_uri
    home = dirname(next((path for path, made in PAGES.items() if made == name), f"docs/{name}"))

    def moved(link: re.Match[str]) -> str:
        text, path, anchor = link[1], normpath(join(home, link[2])), link[3] or ""
        target = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return text if (ROOT / path).exists() else link[0]
        return f"[{text}]({relpath(target, dirname(name) or '.')}{anchor})"

    return _LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Warn of what a page loads from another server; with --strict that is an error."""
    for found in _LOADED.findall(output):
        _LOGGER.warning("%s loads %s from another server; put it into docs/assets", page.file.src_uri, found)
