"""The model card that goes with saved adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ia3.files import replacing

if TYPE_CHECKING:
    from ia3.model import IA3Model

_MODEL_CARD = """---
{base}library_name: peft
tags:
{tags}
---

# (IA)³ adapter{of_base}

{numbers} learned numbers that rescale keys, values and feed-forward activations ([arXiv:2205.05638]({paper})).

```python
from ia3 import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def write_model_card(model: IA3Model, folder: str | os.PathLike) -> None:
    """Write a `README.md` that says what the adapter is, unless the folder has one."""
    name = next(iter(model.peft_config))
    write_card(folder, _base_name(model), sum(parameter.numel() for parameter in model.adapter_parameters(name)))


def update_model_card(model: IA3Model, folder: str | os.PathLike) -> None:
    """Let a folder's `README.md`, such as one that a trainer wrote, say in its head that this is an adapter, and of what."""
    from huggingface_hub import metadata_load, metadata_save

    path = Path(folder, "README.md")
    if not path.exists():
        write_model_card(model, folder)
        return
    head = metadata_load(path) or {}
    base, tags = _base_name(model), head.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    head |= {"library_name": "peft", "tags": list(dict.fromkeys([*tags, *_tags(base)]))}
    head |= {"base_model": base} if base else {}
    with replacing(path) as new:
        shutil.copyfile(path, new)
        metadata_save(new, head)


def write_card(folder: str | os.PathLike, base: str | None, numbers: int) -> None:
    """Write a `README.md` for an adapter of so many numbers, unless the folder has one."""
    card = Path(folder, "README.md")
    if card.exists():
        return
    with replacing(card) as path:
        path.write_text(
            _MODEL_CARD.format(
                base=f"base_model: {base}\n" if base else "",
                tags="\n".join(f'- "{tag}"' if ":" in tag else f"- {tag}" for tag in _tags(base)),
                of_base=f" for {base}" if base else "",
                numbers=f"{numbers:,}",
                paper="https://arxiv.org/abs/2205.05638",
            ),
            encoding="utf-8",
        )


def _base_name(model: IA3Model) -> str | None:
    config = next(iter(model.peft_config.values()))
    return config.base_model_name_or_path or getattr(model.model, "name_or_path", None) or None


def _tags(base: str | None) -> list[str]:
    return ["ia3", *([f"base_model:adapter:{base}"] if base else [])]
