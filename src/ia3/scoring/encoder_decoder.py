"""Encoder-decoders: the encoder reads each prompt once, and one decoder row holds the tree of its choices.

The tree is that of `decoder`, with the decoder's start token in place of the prompt's end. Positions count down the
tree, not along the row: absolute ones are handed to the decoder's position embedding, and T5's relative biases are
looked up by the difference of two places' depths.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ia3.adapter.placement import device_of
from ia3.adapter.targets import inside_wrappers
from ia3.scoring.batch import (
    Batch,
    additive_mask,
    answers_of,
    groups_of_sizes,
    names_of,
    padded,
    pass_tokens,
    prompts_of,
)
from ia3.scoring.family import Family
from ia3.scoring.question import Question, tree_of
from ia3.scoring.states import total

# What of a batch is the decoder's.
_DECODER = ("decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of a prompt of S tokens.

    Attributes:
        last: its last hidden states (S, width), which the decoder attends to.
        states: the mean of its tokens' hidden states: float32 (layers + 1, width).
        output: the class of the encoder's output, in which the model takes the last ones back.
    """

    last: torch.Tensor
    states: torch.Tensor
    output: type

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.last.nbytes + self.states.nbytes


class EncoderDecoder(Family):
    """An encoder-decoder.

    Prompt and choice are two texts, each as the tokenizer opens and closes it (T5: "yes</s>"), as in the code of T-Few's
    authors: the closing token is scored and counts in the choice's length. Leading spaces of a choice mean nothing.
    """

    def pack(self, questions: Sequence[Question]) -> Batch:
        """Each question as a row of the encoder, its prompt, and a row of the decoder, the tree of its choices.

        Returns:
            A `Batch` with `input_ids` and `attention_mask` (B, S) for the encoder, and for the decoder
            `decoder_input_ids` (B, K), `decoder_attention_mask` (B, 1, K, K), 0 where a token attends and the dtype's
            lowest number elsewhere (of floats: eager attention adds whatever mask it is given), and
            `decoder_position_ids` (B, K).
        """
        trees, start = [tree_of(question) for question in questions], self._start_token(questions[0])
        rows, keep = len(questions), max(len(tree.tokens) for tree in trees)
        ids = np.full((rows, keep), self.pad_token_id, dtype=np.int64)
        positions = np.zeros((rows, keep), dtype=np.int64)
        allowed = np.zeros((rows, keep, keep), dtype=bool)
        # Places that hold nothing attend to themselves: a row of the softmax must not be empty.
        allowed[:, np.arange(keep), np.arange(keep)] = True
        for row, tree in enumerate(trees):
            nodes = len(tree.tokens)
            ids[row, :nodes] = [start, *tree.tokens[1:]]
            positions[row, :nodes] = tree.depths
            allowed[row, :nodes, :nodes] = tree.seen
        paths = [[[row * keep + node for node in path] for path in tree.paths] for row, tree in enumerate(trees)]
        return {
            **prompts_of(questions, self.pad_token_id),
            "decoder_input_ids": torch.from_numpy(ids),
            "decoder_attention_mask": additive_mask(allowed, self.dtype),
            "decoder_position_ids": torch.from_numpy(positions),
            "keep": torch.tensor(keep),
            **names_of(questions, [1] * rows),
            **answers_of(questions, paths),
        }

    def plain_rows(self, questions: Sequence[Question]) -> Batch:
        """Each question as a row of the encoder, and each choice as a row of the decoder.

        Returns:
            A `Batch` as of `pack`, but `decoder_attention_mask` is (R, K) with a row for each choice, and `question`
            (R,) says whose it is. `adapter_names` are the questions'.
        """
        start = self._start_token(questions[0])
        texts = [[start, *choice[:-1]] for question in questions for choice in question.choices]
        owners = [i for i, question in enumerate(questions) for _ in question.choices]
        ids, mask = padded(texts, self.pad_token_id)
        keep = ids.shape[1]
        paths: list[list[range]] = [[] for _ in questions]
        for row, (owner, text) in enumerate(zip(owners, texts, strict=True)):
            paths[owner].append(range(row * keep, row * keep + len(text)))
        return {
            **prompts_of(questions, self.pad_token_id),
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            "question": torch.tensor(owners),
            "keep": torch.tensor(keep),
            **names_of(questions, [1] * len(questions)),
            **answers_of(questions, paths),
        }

    def ask(self, *args: Any, **kwargs: Any) -> list[Question]:
        """As `Family.ask`. The encoder reads a prompt whole, whatever the decoder is asked about it."""
        return [replace(question, read=len(question.prompt)) for question in super().ask(*args, **kwargs)]

    def encode(self, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
        """The encoder's output for prompts (B, S)."""
        encoder: nn.Module = self.base.get_encoder()
        return encoder(input_ids=ids, attention_mask=mask, return_dict=True, **more)

    def encoded(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Encoded]:
        """What the encoder, as it is now, makes of prompts that differ, several a pass."""
        found = {}
        device = device_of(self.model)
        for group in groups_of_sizes([(len(prompt), 0) for prompt in prompts], pass_tokens(self.model)):
            ids, mask = (one.to(device) for one in padded([prompts[i] for i in group], self.pad_token_id))
            made = self.encode(ids, mask, output_hidden_states=True)
            for row, index in enumerate(group):
                length = len(prompts[index])
                mean = total(made.hidden_states or (), row, 0, length) / length
                found[prompts[index]] = Encoded(made.last_hidden_state[row, :length].clone(), mean, type(made))
        return found

    def behind(self, batch: Batch, encoded: Sequence[Encoded]) -> Batch:
        """A batch, packed or not, whose prompts the encoder has read: with `encoder_outputs` in place of `input_ids`."""
        states = pad_sequence([one.last for one in encoded], batch_first=True)
        left = {key: value for key, value in batch.items() if key != "input_ids"}
        return {**left, "encoder_outputs": encoded[0].output(last_hidden_state=states)}

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits at each place of the decoder's rows: (R, K, vocabulary)."""
        inputs = {key: batch[key] for key in ("attention_mask", *_DECODER)}
        names = {key: batch[key] for key in ("adapter_names",) if key in batch}
        options: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if "question" not in batch:
            inputs |= {key: batch[key] for key in ("input_ids", "encoder_outputs") if key in batch}
            with decoder_positions(self.base, batch["decoder_position_ids"]):
                return self.model(**inputs, **names, **options).logits
        owners, known = batch["question"], batch.get("encoder_outputs")
        if known is None:
            having: Callable = getattr(inside_wrappers(self.model), "adapter_rows", lambda _: nullcontext())
            with having(names.get("adapter_names")):
                known = self.encode(batch["input_ids"], batch["attention_mask"])
        known = type(known)(last_hidden_state=known.last_hidden_state[owners])
        inputs["attention_mask"] = batch["attention_mask"][owners]
        if names:
            names["adapter_names"] = [names["adapter_names"][owner] for owner in owners.tolist()]
        return self.model(encoder_outputs=known, **inputs, **names, **options).logits

    def _answers(
        self, choices: Sequence[Sequence[str]], names: Sequence[Sequence[str]] | None
    ) -> list[list[list[int]]]:
        different = list(dict.fromkeys(text for texts in choices for text in texts))
        encoded: Any = []
        if different:
            encoded = self.tokenizer(text_target=[text.lstrip(" ") for text in different])["input_ids"]
        tokens = [its if len(its) > sum(self._marks(its)) else [] for its in encoded]
        known = dict(zip(different, tokens, strict=True))
        return [[known[text] for text in texts] for texts in choices]

    def _start_token(self, question: Question) -> int:
        """The token that the decoder starts with: what the model itself puts before a target (mBART: its language)."""
        shift: Callable | None = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
        config = self.base.config
        if shift is None or (config.decoder_start_token_id is None and config.model_type not in ("mbart", "plbart")):
            return next(
                t for t in (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id) if t is not None
            )
        return int(shift(labels=torch.tensor([question.choices[0]]))[0, 0])


@contextmanager
def decoder_positions(base: Any, positions: torch.Tensor) -> Iterator[None]:
    """Within `with`, the model's decoder takes these positions (B, K) in place of the numbers of the row's places.

    Hooks hand them in, in this thread's passes alone: other threads may use the model meanwhile, and it is left as it
    was. A model whose positions cannot be handed in takes the row's: the scores of its packed rows are wrong.
    """
    thread, handles = threading.get_ident(), []

    def absolute(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Position embeddings (BART and its kin) take the positions as they are."""
        return args, {**kwargs, "position_ids": positions}

    def by_row(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Some of them put an axis in front, for positions that are those of all rows."""
        return output.flatten(0, -3)

    def relative(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A layer with relative biases (T5 and its kin) takes those of two tokens of a text at these positions."""
        bias = _relative_bias(module, positions)
        if "position_bias" in inspect.signature(module.forward).parameters:  # it hands them on to the other layers
            return args, {**kwargs, "position_bias": bias}
        # It adds those of the row's places itself: the mask takes them off again.
        own = module.compute_bias(positions.shape[1], positions.shape[1])
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + (bias - own)}

    def here(hook: Callable) -> Callable:
        # While another thread takes its hook away, this one may be called without keyword arguments.
        return lambda *given: hook(*given) if threading.get_ident() == thread else None

    try:
        for module in base.get_decoder().modules():
            if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
                handles.append(module.register_forward_pre_hook(here(relative), with_kwargs=True))
            elif isinstance(module, nn.Embedding) and "position_ids" in inspect.signature(module.forward).parameters:
                handles.append(module.register_forward_pre_hook(here(absolute), with_kwargs=True))
                handles.append(module.register_forward_hook(here(by_row)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative_bias(module: Any, positions: torch.Tensor) -> torch.Tensor:
    """What a layer adds to the attention of tokens at these positions (B, K) to each other: (B, heads, K, K)."""
    size = int(positions.max()) + 1
    table = module.compute_bias(size, size)[0]
    return table[:, positions[:, :, None], positions[:, None, :]].transpose(0, 1)
