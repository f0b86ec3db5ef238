"""Read the YAML files of published prompt collections as tasks (Bach et al. 2022, arXiv:2202.01279)."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.nodes
from pydantic import ValidationError

from ia3.errors import InputError, problems, shown
from ia3.task.described import NOTHING, read_yaml
from ia3.task.task import MOST_TEMPLATES, Task
from ia3.task.template import BAR, Template, parse

logger = logging.getLogger(__name__)


def read_prompts(path: str | os.PathLike, names: Sequence[str] | None = None) -> Task:
    """A task with a collection's templates.

    Its labels are the positions of answers, "0", "1", …, in each template's list. Class labels of hub data sets are
    read as numbers, as the templates expect.

    Args:
        path: the collection's `templates.yaml`.
        names: the templates to use, by name; None: all templates that ask the data set's original task for every row
            and have the most common number of answers.

    Raises:
        InputError: the file does not exist, is not a collection, or has no usable template.
    """
    path = Path(path)
    return task_of(read_yaml(path), path, names)


def task_of(values: Mapping[str, Any], path: Path, names: Sequence[str] | None = None) -> Task:
    """The same as `read_prompts`, for the content of a file."""
    entries = values.get("templates")
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        raise InputError(f"Expected a collection of prompts in {path}, a mapping `templates`; found none.")
    if len(entries) > MOST_TEMPLATES:
        raise InputError(f"Expected at most {MOST_TEMPLATES} templates in {path}, found {len(entries)}.")
    by_name = {str(entry.get("name") or key): entry for key, entry in entries.items()}
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise InputError(
            f"Expected names of templates in {path}, found {shown(unknown)}; there are {shown(by_name, 20)}."
        )
    found = {name: _template(name, by_name[name], chosen=names is not None) for name in names or by_name}
    used = [template for template in found.values() if isinstance(template, Template)]
    # All templates of a task have the same labels, so the same number of answers.
    sizes = [len(template.choices) if isinstance(template.choices, dict) else None for template in used]
    usual = Counter(sizes).most_common(1)[0][0] if sizes else None
    unused = {name: why for name, why in found.items() if isinstance(why, str)}
    unused |= {template.name: "number of answers" for template, size in zip(used, sizes, strict=True) if size != usual}
    by_reason: dict[str, list[str]] = {}
    for name, why in unused.items():
        by_reason.setdefault(why, []).append(name)
    reasons = "; ".join(f"{why} ({shown(its, 3)})" for why, its in by_reason.items())
    if len(unused) == len(found) or (names is not None and unused):
        raise InputError(
            f"Expected templates in {path} with the same number of answers, found others: {reasons or 'none'}."
        )
    if unused:
        logger.info("%s: %d of %d templates cannot be used: %s.", path, len(unused), len(found), reasons)
    source = [str(values[key]) for key in ("dataset", "subset") if values.get(key) and values[key] not in NOTHING]
    return Task.create(
        {
            "name": "_".join(part.rpartition("/")[2] for part in source) or path.stem,
            "train": ":".join(source) or None,
            "class_names": False,
            "templates": [template for template in used if template.name not in unused],
        },
        str(path),
    )


def _template(name: str, entry: Mapping[str, Any], chosen: bool) -> Template | str:
    """A template, or why it is unusable. Unless it is `chosen` by name, it must ask the original task for every row."""
    metadata = entry.get("metadata")
    if not chosen and str(metadata.get("original_task") if isinstance(metadata, Mapping) else None).lower() != "true":
        return "not the original task"
    choices = entry.get("answer_choices")
    if not choices or choices in NOTHING:
        return "no answer choices, but free text"
    prompt = str(entry.get("jinja", ""))
    if BAR not in prompt:
        return f"no answer behind {BAR}"
    try:
        template = Template(
            name=name,
            prompt=prompt,
            choices=f" {BAR} ".join(map(str, choices)) if isinstance(choices, list) else choices,
        )
    except ValidationError as error:
        return problems(error, "template")
    return template if chosen or not _is_conditional(template.prompt) else "nothing to ask of some rows"


def _is_conditional(prompt: str) -> bool:
    """Whether all text of a template depends on a condition without an `else`."""
    said = [
        node
        for node in parse(prompt).body
        if not isinstance(node, jinja2.nodes.Output)
        or any(not isinstance(part, jinja2.nodes.TemplateData) or part.data.strip() for part in node.nodes)
    ]
    return bool(said) and all(isinstance(node, jinja2.nodes.If) and not node.else_ for node in said)
