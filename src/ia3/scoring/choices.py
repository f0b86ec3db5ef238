"""A prompt and all its answer choices in one row: `pack`, `score_choices`.

The choices form a tree behind the prompt, in which common beginnings are shared: a token attends to the prompt and to
its own ancestors, and its position counts on from the prompt. The last token of a choice is predicted, never read, so
it is not in the row: single-token choices add nothing at all. The vocabulary projection runs at the tree only.

This is how decoder-only models are asked. `seq2seq` has the same for encoder-decoders, `classifier` for encoders with a
classification head; `encode` and `token_log_probs` look at the model, and all else is the same for the three. Which models
take packed rows, `layouts` finds out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError
from ia3.scoring.questions import Question, base_of, encode, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.evaluation.icl import Prefix

# Tokens that go through the model at once, padding included: on an accelerator, and on a processor, which is faster when
# activations stay in its caches, and where they take less memory.
BATCH_TOKENS = 4096
_PROCESSOR_TOKENS = 512

# Reading the weights once more costs about as much as so many tokens do.
PASS_TOKENS = 64

# So little padding is no reason for another pass, however short the rows are.
_FEW_TOKENS = 8

Batch = dict[str, Any]
"""Questions as tensors, B questions of at most C choices of at most T tokens:

- the model's own inputs (`input_ids`, `attention_mask`, perhaps `position_ids`), R rows of L tokens; an
  encoder-decoder's rows are its decoder's, see `seq2seq.pack`;
- `keep`: how many last positions, K, of each row have to be projected on the vocabulary (a 0-d tensor);
- `position` (B, C, T): where the prediction of each choice token stands among the R·K projected positions;
- `token` (B, C, T): the choice token; `mask` (B, C, T): whether there is one;
- `label` (B,): the right choice; -100 where it is not known;
- `past_key_values`: where rows continue a text that was read before, its keys and values (see `Prefix`);
- `adapter_names`: where questions say it, the adapter of each of the R rows.
"""


def pack(questions: Sequence[Question], pad_token_id: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Each question as one row: the prompt, then the tree of its choices.

    Prompts end at the same column (padded on the left), so that the tree's predictions are the last K columns.

    Args:
        questions: B of them.
        pad_token_id: fills unused places; nothing attends to it.
        dtype: of the additive attention mask, the model's.

    Returns:
        A `Batch` with R = B rows and `attention_mask` (B, 1, L, L): 0 where a token attends, the dtype's lowest
        number elsewhere.
    """
    width = max(len(question.prompt) for question in questions)
    trees = [tree_of(question) for question in questions]
    keep = max(len(tree.tokens) for tree in trees)
    rows, length = len(questions), width + keep - 1
    ids = np.full((rows, length), pad_token_id, dtype=np.int64)
    positions = np.zeros((rows, length), dtype=np.int64)
    allowed = np.zeros((rows, length, length), dtype=bool)
    # A place that holds nothing attends to itself: a row of the softmax must not be empty.
    allowed[:, np.arange(length), np.arange(length)] = True
    for row, (question, tree) in enumerate(zip(questions, trees, strict=True)):
        start, nodes = width - len(question.prompt), len(tree.tokens) - 1
        ids[row, start:width] = question.prompt
        ids[row, width : width + nodes] = tree.tokens[1:]
        positions[row, start:width] = np.arange(len(question.prompt))
        positions[row, width : width + nodes] = len(question.prompt) - 1 + np.array(tree.depths[1:], dtype=np.int64)
        allowed[row, start:width, start:width] = np.tri(len(question.prompt), dtype=bool)
        for node in range(1, nodes + 1):
            column = width - 1 + node
            allowed[row, column] |= allowed[row, width - 1 + tree.parents[node]]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": additive_mask(allowed, dtype),
        "position_ids": torch.from_numpy(positions),
        "keep": torch.tensor(keep),
        **names_of(questions, [1] * rows),
        **answers_of(
            questions, [[[row * keep + node for node in path] for path in tree.paths] for row, tree in enumerate(trees)]
        ),
    }


def additive_mask(allowed: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds (B, 1, L, L): 0 where a place may attend to another (B, L, L), else the dtype's lowest number."""
    mask = torch.zeros((len(allowed), 1, *allowed.shape[1:]), dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~allowed)[:, None], torch.finfo(dtype).min)


class Tree:
    """The choices of a question as a prefix tree. Node 0 is the end of the prompt; a node is a token that is read.

    `paths` has, for each choice, the node that predicts each of its tokens.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self.tokens, self.parents, self.depths = [-1], [-1], [0]
        self.paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for choice in choices:
            node, path = 0, [0]
            for token in choice[:-1]:
                if (node, token) not in children:
                    children[node, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                node = children[node, token]
                path.append(node)
            self.paths.append(path)

    @property
    def farthest(self) -> int:
        """The choice whose last prediction stands farthest back in the row."""
        return max(range(len(self.paths)), key=lambda choice: self.paths[choice][-1])


def tree_of(question: Question) -> Tree:
    """A question's choices as a prefix tree."""
    return Tree(question.choices)


def plain_rows(questions: Sequence[Question], pad_token_id: int = 0) -> Batch:
    """Each (prompt + choice) as a row of its own, padded on the right: exact for every causal model, and slower.

    Returns:
        A `Batch` with a row for each choice and `attention_mask` (R, L).
    """
    texts = [question.prompt + choice[:-1] for question in questions for choice in question.choices]
    length = max(map(len, texts))
    first = min(len(question.prompt) for question in questions) - 1
    keep = length - first
    ids = torch.full((len(texts), length), pad_token_id)
    mask = torch.zeros((len(texts), length), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    paths, row = [], 0
    for question in questions:
        paths.append([])
        for choice in question.choices:
            start = row * keep + len(question.prompt) - 1 - first
            paths[-1].append(range(start, start + len(choice)))
            row += 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "keep": torch.tensor(keep),
        **names_of(questions, [len(question.choices) for question in questions]),
        **answers_of(questions, paths),
    }


def names_of(questions: Sequence[Question], rows: Sequence[int]) -> Batch:
    """`adapter_names` of a batch whose questions have so many rows each; nothing where they leave it open."""
    names = [name for question, count in zip(questions, rows, strict=True) for name in [question.adapter] * count]
    return {} if names[0] is None else {"adapter_names": names}


def answers_of(questions: Sequence[Question], paths: Sequence[Sequence[Sequence[int]]]) -> Batch:
    """`position`, `token`, `mask` and `label` of a batch."""
    shape = (
        len(questions),
        max(len(question.choices) for question in questions),
        max(len(choice) for question in questions for choice in question.choices),
    )
    position, token, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for b, (question, places) in enumerate(zip(questions, paths, strict=True)):
        for c, (choice, path) in enumerate(zip(question.choices, places, strict=True)):
            position[b, c, : len(choice)] = path
            token[b, c, : len(choice)] = choice
            mask[b, c, : len(choice)] = True
    labels = [-100 if question.label is None else question.label for question in questions]
    return {
        "position": torch.from_numpy(position),
        "token": torch.from_numpy(token),
        "mask": torch.from_numpy(mask),
        "label": torch.tensor(labels),
    }


def token_log_probs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The log-probability of each choice token: float32 (B, C, T), 0 where there is none."""
    logits = _logits(model, batch).float().flatten(0, 1)
    chosen, mask = batch["position"], batch["mask"]
    found = logits[chosen[mask], batch["token"][mask]] - logits.logsumexp(-1)[chosen[mask]]
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits at the last K places of each row: (R, K, vocabulary), or (B, 1, labels) of a classifier."""
    base = base_of(model)
    if "decoder_input_ids" in batch:
        from ia3.scoring import seq2seq

        return seq2seq.logits(model, inside_wrappers(model), base, batch)
    known = inspect.signature(base.forward).parameters
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    inputs = {key: batch[key] for key in names if key in batch}
    inputs = {key: value for key, value in inputs.items() if key in known}
    if "adapter_names" in batch:
        inputs["adapter_names"] = batch["adapter_names"]
    keep = int(batch["keep"])
    # As indices, not as a number: a slice is not contiguous, and a product that has a gradient then reads the whole
    # vocabulary's matrix anew for each row. (A model on several devices would divide the indices among them.)
    last: Any = keep if isinstance(model, nn.DataParallel) else torch.arange(-keep, 0)
    options: dict[str, Any] = {"use_cache": "past_key_values" in batch, "logits_to_keep": last, "return_dict": True}
    logits = model(**inputs, **{key: value for key, value in options.items() if key in known}).logits
    return logits[:, None] if logits.dim() == 2 else logits[:, -keep:]


def normalized_scores(log_probs: torch.Tensor, mask: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """β(x, y) = Σ_t log p(y_t | x, y_<t) / T^power for each choice (Liu et al. 2022, section 3.2): (B, C).

    Minus infinity where a question has fewer than C choices.
    """
    length = mask.sum(-1)
    scores = log_probs.sum(-1) / length.clamp(min=1).to(log_probs.dtype).pow(power)
    return scores.masked_fill(length == 0, -math.inf)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within `with`, the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def sizes_of(question: Question) -> tuple[int, int]:
    """How many tokens a question's packed row has: the prompt's, and those of the tree behind it.

    Both begin at the same column in all rows of a batch, whether one row of a decoder holds both or, in an
    encoder-decoder, the encoder has the one and the decoder the other.
    """
    return len(question.prompt), len(tree_of(question).tokens) - 1


def row_length(question: Question) -> int:
    """How many tokens a question's packed row has."""
    return sum(sizes_of(question))


def text_length(question: Question) -> int:
    """How many tokens are read of a question's prompt and its longest choice, in a row of their own."""
    return len(question.prompt) + max(map(len, question.choices)) - 1


def pass_tokens(model: nn.Module) -> int:
    """How many tokens, padding included, are best read by a model at once where it is."""
    return _PROCESSOR_TOKENS if next(model.parameters()).device.type == "cpu" else BATCH_TOKENS


def batches(questions: Sequence[Question], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of questions, longest first, in groups of similar length.

    A group's packed rows hold at most so many tokens, and it ends before its padding costs more than another pass
    through the model does, or is more than a few tokens and a tenth of it.
    """
    yield from batches_of_sizes([sizes_of(question) for question in questions], tokens)


def batches_of_sizes(sizes: Sequence[tuple[int, int]], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """`batches` for questions whose `sizes_of` are known."""
    group: list[int] = []
    prompt = tree = filled = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sum(sizes[i])):
        size = sizes[index]
        if group:
            room = (max(prompt, size[0]) + max(tree, size[1])) * (len(group) + 1)
            if room > tokens or room - filled - sum(size) > min(PASS_TOKENS, max(_FEW_TOKENS, room / 10)):
                yield group
                group, prompt, tree, filled = [], 0, 0, 0
        group.append(index)
        prompt, tree, filled = max(prompt, size[0]), max(tree, size[1]), filled + sum(size)
    if group:
        yield group


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    length_normalization: float = 1.0,
    batch_tokens: int | None = None,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    prefix: Prefix | None = None,
) -> list[torch.Tensor]:
    """The length-normalized log-probability of each answer choice of each prompt.

    Args:
        model: a causal language model, an encoder-decoder or a classifier (whose choices are its labels, in their
            order, for every prompt), adapted or not. It is put into evaluation mode for the time.
        tokenizer: its tokenizer.
        prompts: N texts.
        choices: for each prompt its answer choices; they may differ from prompt to prompt. A choice continues the
            prompt, so it usually begins with a space.
        length_normalization: the power of the choice's token count that the sum is divided by; 0: not at all.
        batch_tokens: how many tokens go through the model at once; None: as many as is fast (`pass_tokens`).
        on_progress: called with the indices of the prompts that each batch finished.
        adapter_names: for each prompt the adapter of an `IA3Model` that answers it; None: the active ones.
        prefix: a text that stands before each prompt, run through this model once.

    Returns:
        N float32 tensors on the CPU, one number a choice: Σ_t log p(y_t | x, y_<t) / T^power; a classifier's are the
        log-probabilities of its labels.

    Raises:
        InputError: see `encode`; or scores that are not numbers.
    """
    questions = encode(tokenizer, prompts, choices, model=model) if prefix is None else prefix.encode(prompts, choices)
    return score_questions(
        model, tokenizer, questions, length_normalization, batch_tokens, on_progress, adapter_names, prefix
    )


def score_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    length_normalization: float = 1.0,
    batch_tokens: int | None = None,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    prefix: Prefix | None = None,
) -> list[torch.Tensor]:
    """`score_choices` for questions that are token ids already; with a prefix, those that it encodes."""
    from ia3.scoring.beginning import parts

    base = base_of(model)
    if adapter_names is not None:
        check: Callable | None = getattr(inside_wrappers(model), "check_adapter_names", None)
        if check is None:
            raise InputError(f"Expected an IA3Model, whose adapters adapter_names are, found a {type(base).__name__}.")
        check(adapter_names)  # before the first batch, and with the numbers of the prompts
        if len(adapter_names) != len(questions):
            raise InputError(f"Expected adapter_names for the {len(questions)} prompts, found {len(adapter_names)}.")
        questions = [replace(question, adapter=name) for question, name in zip(questions, adapter_names, strict=True)]
    device = next(model.parameters()).device
    pad = padding_id(tokenizer)
    results: list[torch.Tensor] = [torch.empty(0)] * len(questions)
    divided = (parts if prefix is None else prefix.parts)(model, questions, pad, batch_tokens)
    with evaluating(model), torch.inference_mode():
        for group, batch in divided:
            batch = to_device(batch, device)
            scores = normalized_scores(token_log_probs(model, batch), batch["mask"], length_normalization).cpu()
            for row, index in zip(scores, group, strict=True):
                question = questions[index]
                results[index] = torch.empty(len(question.choices))
                results[index][list(question.order or range(len(question.choices)))] = row[: len(question.choices)]
                if not torch.isfinite(results[index]).all():
                    raise InputError(
                        f"The model gives NaN or infinite scores (prompt {index}); is the adapter or the base broken?"
                    )
            if on_progress is not None:
                on_progress(group)
    return results


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
