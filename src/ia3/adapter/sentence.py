"""Sentence encoders: an encoder's states pooled to one embedding of length 1, and a linear head on it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ia3.errors import InputError, brief, shown
from ia3.files import locate_beside, parse_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What sentence-transformers calls the way of pooling: today's name, and the switch of older files.
_SWITCHES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ADVICE = "use a model without it, such as minilm"

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(mask), device=mask.device), (mask * places).argmax(1)]


# Embeddings have length 1, so a mean and a mean over the root of the length are the same.
_POOLS: dict[str, Pool] = {
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean,
    "cls": lambda states, mask: states[:, 0],
    "max": lambda states, mask: states.masked_fill(~mask[..., None].bool(), -torch.inf).max(1).values,
    "lasttoken": _last,
}


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes an embedding of its states.

    Attributes:
        mode: sentence-transformers' name: "mean", "cls", "max", "lasttoken".
        max_length: the number of tokens that it reads of a text; None: as many as it has positions for.
    """

    mode: str = "mean"
    max_length: int | None = None

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1 (B, H) of states (B, L, H), padded on the right where `mask` (B, L) is 0."""
        return F.normalize(_POOLS[self.mode](states, mask), dim=-1)


def pooling_of(source: str | os.PathLike) -> Pooling | None:
    """The pooling that a folder or hub repository of sentence-transformers asks for; None if it is not one.

    Raises:
        InputError: it has modules other than Transformer, Pooling and Normalize, or pools in a way that is unknown here.
    """
    modules = _json(source, "modules.json", list)
    if modules is None:
        return None
    paths = {str(each.get("type", "")).rpartition(".")[2]: str(each.get("path", "")) for each in modules}
    unknown = [kind for kind in paths if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or "Transformer" not in paths:
        raise InputError(
            f"Expected a sentence encoder of the modules Transformer, Pooling and Normalize in {brief(str(source))}, found "
            f"{shown([*paths])}",
            _ADVICE,
        )
    settings = _json(source, "config_sentence_transformers.json", dict) or {}
    name = settings.get("default_prompt_name")
    if name is not None and (settings.get("prompts") or {}).get(name):
        raise InputError(
            f"Expected a sentence encoder that reads texts as they are, found one in {brief(str(source))} that begins them "
            f"with its prompt {brief(name)}",
            _ADVICE,
        )
    found = _json(source, f"{paths['Pooling']}/config.json", dict) or {} if "Pooling" in paths else {}
    modes = found.get("pooling_mode") or [name for name, switch in _SWITCHES.items() if found.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else [*modes]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise InputError(
            f"Expected one pooling of {shown(_POOLS)} in {brief(str(source))}, found {shown(modes)}", _ADVICE
        )
    limit = (_json(source, f"{paths['Transformer']}/sentence_bert_config.json".lstrip("/"), dict) or {}).get(
        "max_seq_length"
    )
    return Pooling(modes[0], limit if isinstance(limit, int) and limit > 0 else None)


def _json(source: str | os.PathLike, name: str, kind: type) -> Any:
    """The content of a model's file; None if it does not exist."""
    if os.path.isdir(source):
        path = Path(source, name)
        if not path.is_file():
            return None
    else:
        found = locate_beside(source, name)
        if found is None:
            return None
        path = Path(found)
    content = parse_json(path.read_bytes(), path, "download the model again")
    if not isinstance(content, kind) or (kind is list and not all(isinstance(each, Mapping) for each in content)):
        raise InputError(f"Expected {brief(str(path))} as sentence-transformers writes it, found something else.")
    return content


@dataclass
class SentenceOutput(ModelOutput):
    """What a sentence encoder makes of texts.

    Attributes:
        logits: (B, labels), of the head.
        embeddings: (B, H), of length 1.
    """

    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


class SentenceEncoder:
    """What makes an encoder's class a sentence encoder's; see `sentence_encoder`.

    The modules keep the names that they have in the encoder, so other libraries can give its vectors to the encoder
    alone. An untrained head is zero: all labels are equally probable.

    Attributes:
        classifier: the head, logits = W e + b.
        pooling: how states become an embedding.
    """

    is_sentence_encoder = True
    pooling = Pooling()

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)  # type: ignore[call-arg]
        size = getattr(config, "hidden_size", None) or config.d_model
        self.classifier = nn.Linear(size, config.num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> SentenceOutput:
        """Embeddings of texts that are padded on the right, and the head's logits."""
        states = super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True}
        )
        embeddings = self.pooling(states.last_hidden_state, attention_mask)
        return SentenceOutput(logits=self.classifier(embeddings), embeddings=embeddings)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained`, with the files that tell sentence-transformers how to pool."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [
            {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for idx, (kind, path) in enumerate(kinds.items())
        ]
        write_json(folder / "modules.json", modules)
        for path in kinds.values():
            (folder / path).mkdir(exist_ok=True)
        switches = {switch: mode == self.pooling.mode for mode, switch in _SWITCHES.items()}
        write_json(
            folder / "1_Pooling/config.json", {"word_embedding_dimension": self.classifier.in_features, **switches}
        )
        if self.pooling.max_length is not None:
            write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.pooling.max_length})


@functools.cache
def _class(encoder: type) -> type:
    return type(f"Sentence{encoder.__name__}", (SentenceEncoder, encoder), {"__module__": __name__})


def sentence_encoder(source: str, config: Any, pooling: Pooling, **options: Any) -> PreTrainedModel:
    """The sentence encoder of a checkpoint.

    Args:
        source: a folder or hub id.
        config: its config.
        pooling: how states become an embedding.
        **options: arguments of `PreTrainedModel.from_pretrained`.
    """
    from transformers import AutoModel

    encoder = AutoModel._model_mapping[type(config)]  # type: ignore[attr-defined]
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder
    model, info = _class(encoder).from_pretrained(source, output_loading_info=True, **options)
    if any(name.startswith("classifier.") for name in info["missing_keys"]):
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    model.pooling = pooling
    return model
