"""Questions for encoder-decoders: the encoder reads each prompt once, and one decoder row holds the tree of its choices.

The tree is that of `ia3.scoring.choices`, with the decoder's start token in place of the prompt's end. Positions count down
the tree, not along the row: absolute ones are handed to the decoder's position embedding, and T5's relative biases are
looked up by the difference of two places' depths.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ia3.scoring.choices import Batch, additive_mask, answers_of, names_of, tree_of
from ia3.scoring.questions import Question

# What of a batch is the decoder's.
_DECODER = ("decoder_input_ids", "decoder_attention_mask")


def pack(questions: Sequence[Question], start: int, pad_token_id: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Each question as a row of the encoder, its prompt, and a row of the decoder, the tree of its choices.

    Args:
        questions: B of them.
        start: the token that the decoder starts with; see `start_token`.
        pad_token_id: fills unused places, on the right.
        dtype: of the additive attention mask, the model's.

    Returns:
        A `Batch` with `input_ids` and `attention_mask` (B, S) for the encoder, and for the decoder `decoder_input_ids`
        (B, K), `decoder_attention_mask` (B, 1, K, K), 0 where a token attends and the dtype's lowest number elsewhere
        (of floats: eager attention adds whatever mask it is given), and `decoder_position_ids` (B, K).
    """
    trees = [tree_of(question) for question in questions]
    rows, keep = len(questions), max(len(tree.tokens) for tree in trees)
    ids = np.full((rows, keep), pad_token_id, dtype=np.int64)
    positions = np.zeros((rows, keep), dtype=np.int64)
    allowed = np.zeros((rows, keep, keep), dtype=bool)
    # Places that hold nothing attend to themselves: a row of the softmax must not be empty.
    allowed[:, np.arange(keep), np.arange(keep)] = True
    for row, tree in enumerate(trees):
        nodes = len(tree.tokens)
        ids[row, :nodes] = [start, *tree.tokens[1:]]
        positions[row, :nodes] = tree.depths
        for node in range(1, nodes):
            allowed[row, node] |= allowed[row, tree.parents[node]]
    return {
        **prompts(questions, pad_token_id),
        "decoder_input_ids": torch.from_numpy(ids),
        "decoder_attention_mask": additive_mask(allowed, dtype),
        "decoder_position_ids": torch.from_numpy(positions),
        "keep": torch.tensor(keep),
        **names_of(questions, [1] * rows),
        **answers_of(
            questions, [[[row * keep + node for node in path] for path in tree.paths] for row, tree in enumerate(trees)]
        ),
    }


def plain_rows(questions: Sequence[Question], start: int, pad_token_id: int = 0) -> Batch:
    """Each question as a row of the encoder, and each choice as a row of the decoder: exact for every model, and slower.

    Returns:
        A `Batch` as of `pack`, but `decoder_attention_mask` is (R, K) with a row for each choice, and `question` (R,)
        says whose it is. `adapter_names` are the questions'.
    """
    texts = [choice[:-1] for question in questions for choice in question.choices]
    owners = [i for i, question in enumerate(questions) for _ in question.choices]
    keep = 1 + max(map(len, texts))
    ids = torch.full((len(texts), keep), pad_token_id)
    mask = torch.zeros((len(texts), keep), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : 1 + len(text)] = torch.tensor([start, *text])
        mask[row, : 1 + len(text)] = 1
    paths: list[list[range]] = [[] for _ in questions]
    for row, (owner, text) in enumerate(zip(owners, texts, strict=True)):
        paths[owner].append(range(row * keep, row * keep + len(text) + 1))
    return {
        **prompts(questions, pad_token_id),
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
        "question": torch.tensor(owners),
        "keep": torch.tensor(keep),
        **names_of(questions, [1] * len(questions)),
        **answers_of(questions, paths),
    }


def prompts(questions: Sequence[Question], pad_token_id: int) -> Batch:
    """`input_ids` and `attention_mask` (B, S) of the prompts, padded on the right."""
    length = max(len(question.prompt) for question in questions)
    ids = torch.full((len(questions), length), pad_token_id)
    mask = torch.zeros((len(questions), length), dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, : len(question.prompt)] = torch.tensor(question.prompt)
        mask[row, : len(question.prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def start_token(base: nn.Module, question: Question) -> int:
    """The token that a model's decoder starts with: what the model itself puts before a target (mBART: its language)."""
    shift: Callable | None = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    config: Any = base.config
    if shift is None or (config.decoder_start_token_id is None and config.model_type not in ("mbart", "plbart")):
        return next(
            t for t in (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id) if t is not None
        )
    return int(shift(labels=torch.tensor([question.choices[0]]))[0, 0])


def logits(model: nn.Module, adapted: nn.Module, base: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits at each place of the decoder's rows: (R, K, vocabulary).

    Args:
        model: what computes: the base model itself, an `IA3Model`, or a wrapper for parallel training.
        adapted: the same without that wrapper.
        base: the transformers model within.
        batch: of `pack` or `plain_rows`.
    """
    inputs = {key: batch[key] for key in ("attention_mask", *_DECODER)}
    names = {key: batch[key] for key in ("adapter_names",) if key in batch}
    options: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if "question" not in batch:
        inputs["input_ids"] = batch["input_ids"]
        with handed_in(base, batch["decoder_position_ids"]):
            return model(**inputs, **names, **options).logits
    owners = batch["question"]
    having: Callable = getattr(adapted, "adapter_rows", lambda _: nullcontext())
    with having(names.get("adapter_names")):
        encoder: nn.Module = base.get_encoder()  # type: ignore[operator]
        known = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True)
    known = known.__class__(last_hidden_state=known.last_hidden_state[owners])
    inputs["attention_mask"] = batch["attention_mask"][owners]
    if names:
        names["adapter_names"] = [names["adapter_names"][owner] for owner in owners.tolist()]
    return model(encoder_outputs=known, **inputs, **names, **options).logits


class _Handed(threading.local):
    """The positions (B, K) of the decoder's row that this thread computes."""

    positions: torch.Tensor | None = None


_handed = _Handed()
_lock = threading.Lock()
_removers: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[Callable[[], None]]]] = weakref.WeakKeyDictionary()


@contextmanager
def handed_in(base: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within `with`, the model's decoder takes these positions (B, K) in place of the numbers of the row's places.

    Other threads may use the model meanwhile, and it is left as it was. A model whose positions cannot be handed in
    takes the row's: the scores of its packed rows are wrong.
    """
    with _lock:
        count, removers = _removers.get(base, (0, []))
        if not count:
            removers = _hook(base)
        _removers[base] = (count + 1, removers)
    before, _handed.positions = _handed.positions, positions
    try:
        yield
    finally:
        _handed.positions = before
        with _lock:
            count, removers = _removers[base]
            if count == 1:
                for remove in removers:
                    remove()
                del _removers[base]
            else:
                _removers[base] = (count - 1, removers)


def _hook(base: nn.Module) -> list[Callable[[], None]]:
    """Make the decoder's modules take what is handed in; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for module in base.get_decoder().modules():  # type: ignore[operator]
        if hasattr(module, "compute_bias"):
            module.compute_bias = _relative(module.compute_bias)  # type: ignore[assignment]
            undo.append(lambda module=module: delattr(module, "compute_bias"))
        elif isinstance(module, nn.Embedding) and "position_ids" in inspect.signature(module.forward).parameters:
            undo.append(module.register_forward_pre_hook(_absolute, with_kwargs=True).remove)
            undo.append(module.register_forward_hook(_by_row).remove)
    return undo


def _absolute(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Position embeddings (BART and its kin) take the positions as they are."""
    positions = _handed.positions
    return args, kwargs if positions is None else {**kwargs, "position_ids": positions}


def _by_row(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Some of them put an axis in front, for positions that are those of all rows."""
    return output if _handed.positions is None else output.flatten(0, -3)


def _relative(compute_bias: Callable) -> Callable:
    """Relative biases (T5 and its kin): that of two tokens of a text at these positions, (B, heads, K, K)."""

    def by_position(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        positions = _handed.positions
        if positions is None:
            return compute_bias(query_length, key_length, *args, **kwargs)
        size = int(positions.max()) + 1
        table = compute_bias(size, size, *args, **kwargs)[0]
        return table[:, positions[:, :, None], positions[:, None, :]].transpose(0, 1)

    return by_position
