"""Model cards: metadata for the hub, and text for people."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.adapted import Adapted
from ia3.adapter.pretrained import hub_id
from ia3.adapter.stored import CARD_MARK, CARD_NAME
from ia3.files import replacing

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "https://arxiv.org/abs/2205.05638"

_BODY = """# (IA)³ adapter{of_base}

{numbers} learned numbers that rescale keys, values and feed-forward activations ([arXiv:2205.05638]({paper})).

{question}```python
from ia3 import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""

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
    base, tags = hub_id(_base_name(model, next(iter(model.peft_config)))), head.get("tags") or []
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
    """The card of an adapter with this base model and number of parameters, of which nothing else is known."""
    body = _BODY.format(
        of_base=f" for {shown_base(base)}" if base else "",
        numbers=f"{numbers:,}",
        question=_FROM_QUESTION if acts_from == "question" else "",
        paper=PAPER,
    )
    return written(body, base, acts_from)


def written(
    body: str,
    base: str | None,
    acts_from: str = "start",
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    **metadata: Any,
) -> str:
    """A card that this package may replace.

    Args:
        body: its text, in Markdown.
        base: the base model as `load_base` takes it; a folder of this machine is left out of the metadata.
        acts_from: see `IA3Config`.
        tags: more tags.
        results: for the metadata's model-index; then `model_name` is required.
        **metadata: more of `huggingface_hub.ModelCardData`; None is left out.
    """
    from huggingface_hub import ModelCardData

    found = hub_id(base)
    library = "peft" if acts_from == "start" else "ia3"  # which the hub's page tells people to load it with
    data = ModelCardData(
        base_model=found,
        library_name=library,
        tags=[*_tags(found), *tags],
        eval_results=list(results) or None,
        **metadata,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{CARD_MARK}\n\n{body.strip()}\n"


def shown_base(base: str | None) -> str:
    """A base model's name for a card: of a folder or file, which others do not have, the last part."""
    return hub_id(base) or Path(base or "an unnamed model").name


def _base_name(model: Adapted, name: str) -> str | None:
    return model.peft_config[name].base or getattr(model.model, "name_or_path", None) or None


def _tags(base: str | None) -> list[str]:
    return ["ia3", *([f"base_model:adapter:{base}"] if base else [])]
