"""The model card of saved adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ia3.adapter.adapted import Adapted
from ia3.adapter.stored import CARD_MARK, CARD_NAME
from ia3.files import replacing

_MODEL_CARD = """---
{base}library_name: peft
tags:
{tags}
---

{mark}

# (IA)³ adapter{of_base}

{numbers} learned numbers that rescale keys, values and feed-forward activations ([arXiv:2205.05638]({paper})).

{question}```python
from ia3 import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""

_FROM_QUESTION = """The vectors act from the question on, behind a text that the base model reads as it is (`acts_from: question`); in an
encoder-decoder, in the decoder alone. PEFT does not load such an adapter: there it would act on the text too, as another function.
It cannot be merged.

"""


def write_model_card(model: Adapted, folder: str | os.PathLike) -> None:
    """Write a `README.md` that describes the first adapter, unless the folder has one."""
    card = Path(folder, CARD_NAME)
    if card.exists():
        return
    with replacing(card) as path:
        path.write_text(model_card(model, next(iter(model.peft_config))), encoding="utf-8")


def update_model_card(model: Adapted, folder: str | os.PathLike) -> None:
    """Add to the metadata of a folder's `README.md`, such as a trainer's, that this is an adapter, and its base
    model."""
    from huggingface_hub import metadata_load, metadata_save

    path = Path(folder, CARD_NAME)
    if not path.exists():
        write_model_card(model, folder)
        return
    head = metadata_load(path) or {}
    base, tags = _base_name(model, next(iter(model.peft_config))), head.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    head |= {"library_name": "peft", "tags": list(dict.fromkeys([*tags, *_tags(base)]))}
    head |= {"base_model": base} if base else {}
    with replacing(path) as new:
        shutil.copyfile(path, new)
        metadata_save(new, head)


def model_card(model: Adapted, name: str) -> str:
    """The card of a model's adapter."""
    numbers = sum(parameter.numel() for parameter in model.adapter_parameters(name))
    return card_of(_base_name(model, name), numbers, model.peft_config[name].acts_from)


def card_of(base: str | None, numbers: int, acts_from: str = "start") -> str:
    """The card of an adapter with this base model and number of parameters."""
    return _MODEL_CARD.format(
        base=f"base_model: {base}\n" if base else "",
        tags="\n".join(f'- "{tag}"' if ":" in tag else f"- {tag}" for tag in _tags(base)),
        of_base=f" for {base}" if base else "",
        numbers=f"{numbers:,}",
        question=_FROM_QUESTION if acts_from == "question" else "",
        paper="https://arxiv.org/abs/2205.05638",
        mark=CARD_MARK,
    )


def _base_name(model: Adapted, name: str) -> str | None:
    return model.peft_config[name].base_model_name_or_path or getattr(model.model, "name_or_path", None) or None


def _tags(base: str | None) -> list[str]:
    return ["ia3", *([f"base_model:adapter:{base}"] if base else [])]
