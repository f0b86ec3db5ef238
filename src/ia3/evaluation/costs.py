"""The cost of a method, as in the paper's comparison with in-context learning (Liu et al. 2022, section 4.2)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ia3.adapter.placement import device_of
from ia3.evaluation.prediction import Prediction, predict
from ia3.scoring.batch import Batch, to_device
from ia3.scoring.family import base_of, evaluating
from ia3.scoring.prefix import Prefix
from ia3.scoring.question import Question, row_length
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.rows import as_rows
from ia3.task.task import Task
from ia3.training.examples import training_examples
from ia3.training.losses import tfew_loss

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.task.kinds import AnyTask
    from ia3.training.recipe import Recipe

# Number of batches, of different lengths, to count FLOPs in. This happens after timing, because counting is slow.
_COUNTED_BATCHES = 4

# Number of training steps to count FLOPs in; the others are assumed to be equal.
_COUNTED_STEPS = 4


def count_flops() -> FlopCounterMode:
    """Count the floating-point operations of matrix products in a `with` block; `get_total_flops()` returns them.

    A product of (m, k) and (k, n) has 2·m·k·n operations. Attention counts in full, masked positions included.
    PyTorch's counter does not know the fused attention of CPUs, so its formula is added here.
    """

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    fused = torch.ops.aten
    formulas = {
        fused._scaled_dot_product_flash_attention_for_cpu: forward,
        fused._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def estimated_flops(parameters: int, tokens: float, encoder_decoder: bool = False, training: bool = False) -> float:
    """The paper's estimate for N parameters: 2·N per token in a decoder; N in an encoder-decoder, where each token goes
    through one half; three times as many for training (Kaplan et al. 2020)."""
    return (1 if encoder_decoder else 2) * parameters * tokens * (3 if training else 1)


def count_parameters(model: nn.Module) -> int:
    """N of the estimate: the number of all parameters of the base model, embeddings included."""
    return sum(parameter.numel() for name, parameter in base_of(model).named_parameters() if "ia3_l" not in name)


def cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values per token; 0 for a model without a key/value cache.

    2 · layers · key-value heads · head width · bytes per number. In an encoder-decoder, the cache is the decoder's, for
    its own tokens and for the encoder's tokens that it attends to.
    """
    base = base_of(model)
    both = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    ids = torch.zeros((1, 4), dtype=torch.long, device=device_of(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **({"decoder_input_ids": ids} if both else {})}
    with evaluating(model), torch.no_grad():
        cache = getattr(base(**inputs, use_cache=True, return_dict=True), "past_key_values", None)
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if both and cache is not None else [cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", [])]
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(one.nbytes for one in tensors if one is not None) // (ids.numel() * (1 + both))


@dataclass(frozen=True)
class Cost:
    """The mean cost of a row.

    Attributes:
        flops: operations per row; with a prefix, only those that each row needs again.
        tokens: mean tokens of a row, the prefix included.
        seconds: wall time per row, in batches.
    """

    flops: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Measured(Cost):
    """Predictions for rows, and the mean cost of one.

    Attributes (more in `Cost`):
        predictions: one per row.
    """

    predictions: list[Prediction]


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Any,
    prefix: Prefix | None = None,
    on_progress: Callable[[list[int]], None] | None = None,
    recipe: Recipe | None = None,
) -> Measured:
    """Predict the labels of rows, and measure the cost.

    FLOPs are counted in at most four prediction batches of different lengths, padding included. The other batches are
    assumed to have the same FLOPs per position. A shared prefix that the model reads once is counted in full, and each
    row gets its share.

    Args:
        model, tokenizer, task, rows, prefix, on_progress, recipe: see `predict`; at least one row.
    """
    rows = as_rows(rows, task)
    longest = max(rows, key=lambda row: len(task.prompt(row)))
    predict(model, tokenizer, task, [longest], recipe=recipe, prefix=prefix)  # decides how rows are packed
    started = time.perf_counter()
    predictions = predict(model, tokenizer, task, rows, on_progress, recipe=recipe, prefix=prefix)
    seconds = time.perf_counter() - started
    scorer = Scorer(model, tokenizer)
    questions = scorer.questions(task.wordings(rows), labelled=False, prefix=prefix)
    behind = len(prefix.tokens) if prefix is not None and prefix.is_cached else 0
    tokens = behind + statistics.mean(map(row_length, questions))
    return Measured(flops_of(scorer, questions, prefix), tokens, seconds / len(rows), predictions)


def flops_of(scorer: Scorer, questions: Sequence[Question], prefix: Prefix | None = None) -> float:
    """Operations to read a question with its choices: a mean, counted as `measure` does. A text that is generated costs what
    reading it costs, but for attention, which generation computes for the tokens so far alone."""
    device = device_of(scorer.model)
    with evaluating(scorer.model), torch.inference_mode():
        places = [_places(batch) for _, batch in scorer.batches(questions, prefix=prefix)]
        count = min(len(places), _COUNTED_BATCHES)
        counted = [(2 * i + 1) * len(places) // (2 * count) for i in range(count)]
        in_rows = 0
        with count_flops() as counter:
            for number, (_, batch) in enumerate(scorer.batches(questions, prefix=prefix)):
                if number in counted:
                    before = counter.get_total_flops()
                    scorer.log_probs(to_device(batch, device))
                    in_rows += counter.get_total_flops() - before
    once = counter.get_total_flops() - in_rows
    return (once + in_rows * sum(places) / sum(places[number] for number in counted)) / len(questions)


class RowCost(NamedTuple):
    """What it costs to answer a row, the mean of some.

    Attributes:
        seconds: wall time, in one batch.
        flops: operations.
    """

    seconds: float
    flops: float


def row_cost(ask: Callable[[list[Any]], Any], rows: Sequence[Any]) -> RowCost:
    """Measure what it costs to answer rows: once for the time, and once more to count, which is slow.

    Args:
        ask: answers rows, and keeps nothing between calls.
        rows: at least one.
    """
    started = time.perf_counter()
    ask(list(rows))
    seconds = time.perf_counter() - started
    with count_flops() as counter:
        ask(list(rows))
    return RowCost(seconds / len(rows), counter.get_total_flops() / len(rows))


def _places(batch: Batch) -> int:
    """The number of token positions in a batch, padding included."""
    return sum(batch[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch)


def examples_seen(rows: int, recipe: Recipe, steps: int) -> int:
    """The number of examples in all steps, with repeats. The last batch of an epoch may be smaller."""
    epochs, more = divmod(steps, math.ceil(rows / recipe.batch_size))
    return epochs * rows + min(more * recipe.batch_size, rows)


class ExampleFlops(NamedTuple):
    """FLOPs of training on an example.

    Attributes:
        once: of reading its text, for an adapter that acts from the question on.
        each: each time that it is seen, forward and backward.
    """

    once: float
    each: float


def example_flops(
    model: IA3Model, tokenizer: PreTrainedTokenizerBase, task: AnyTask, rows: Any, recipe: Recipe
) -> ExampleFlops:
    """FLOPs of training the active adapter on one example: the mean of at most four steps.

    Counting runs separately from training, because it uses other kernels, which round differently. It trains nothing
    and leaves no gradients.

    Args:
        model, tokenizer, recipe: see `TFewTrainer`.
        task, rows: see `Member`.
    """
    scorer = Scorer(model, tokenizer, Readings() if model.waits_for_question() else None)
    examples = training_examples(scorer, task, rows, recipe, seed=0)
    size, count = recipe.batch_size, min(_COUNTED_STEPS, max(len(examples) // recipe.batch_size, 1))
    steps = [[one.drawn(step) for one in examples[step * size : (step + 1) * size]] for step in range(count)]
    device = device_of(model)
    frozen = [
        parameter for parameter in model.adapter_parameters(model.active_adapters[0]) if not parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        with evaluating(model):  # restores the modes afterwards
            model.train()  # sharing of prefixes depends on it
            scorer.foresee([question for questions in steps for question in questions])
            for questions in steps:  # the test whether packing and sharing are exact runs once, not in each step
                for _ in scorer.training_batches(questions):
                    pass
            with count_flops() as reading:
                if scorer.readings is not None:
                    scorer.readings.clear()
                    scorer.foresee([question for questions in steps for question in questions])
            with count_flops() as counter:
                for questions in steps:
                    for _, batch in scorer.training_batches(questions):
                        batch = to_device(batch, device)
                        what = scorer.log_probs(batch), batch["mask"], batch["label"]
                        loss = tfew_loss(*what, weights=None, **recipe.loss_weights)
                        loss.total.backward()
        seen = sum(map(len, steps))
        texts = len({question.text for questions in steps for question in questions})
        return ExampleFlops(reading.get_total_flops() / texts, counter.get_total_flops() / seen)
    finally:
        model.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)
