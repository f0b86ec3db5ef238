"""The floor: the frozen base model's bare forward over the fewest tokens that a job needs.

- Tokens: those of the prompts, what all of them begin with only once, and each beginning of a choice once a prompt.
  They stand in rows of one length, without padding, with the causal mask that attention has built in.
- Logits: one for each distinct beginning of a choice, which the next token is predicted from.
- Training: forward and the gradient of the input embeddings, no gradient of a weight, no loss, no optimizer.
- Generating and mixed batches: the base model without adapters. Loading: reading the files' bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .peers import Clock, Column, Example, Result, tokens_of

# As large as a batch is useful for.
_TOKENS = 2048


def needed(examples: Sequence[Example], shared: int = 0) -> tuple[int, int]:
    """How many tokens have to be read, and how many predictions made from them.

    Args:
        examples: what is asked.
        shared: how many tokens all prompts begin with, read elsewhere.
    """
    read = predicted = 0
    for prompt, choices, _ in examples:
        beginnings = {tuple(choice[:size]) for choice in choices for size in range(len(choice))}
        read += len(prompt) - shared + len(beginnings) - 1  # the empty one is the prompt's end
        predicted += len(beginnings)
    return read, predicted


def shared_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own."""
    if len(examples) < 2:
        return 0
    first, last = min(prompt for prompt, _, _ in examples), max(prompt for prompt, _, _ in examples)
    pairs = zip(first[:-1], last[:-1], strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)) - 1)


class Floor(Column):
    """The frozen model alone."""

    def adapt(self, model: nn.Module) -> Any:
        return model

    def release(self, model: Any) -> None:
        pass

    def randomized(self, model: Any, number: int = 0, name: str = "default") -> Any:
        return model

    def hold(self, model: Any, count: int) -> None:
        pass

    def load_model(self, job: dict[str, Any]) -> Callable[[], Result]:
        from safetensors.torch import load_file

        files = sorted(Path(self.folder).glob("*.safetensors"))

        def run() -> Result:
            clock = Clock()
            for file in files:
                for value in load_file(file).values():
                    value.flatten()[::1024].sum()
            clock.lap("load")
            return clock.seconds, []

        return run

    def train(self, job: dict[str, Any]) -> Callable[[], Result]:
        point, tested = job["points"][0], job["tested"]
        texts = (point["prompts"], point["choices"], point["labels"])
        drawn = job["steps"] * job["batch_size"]

        def run() -> Result:
            clock = Clock()
            examples = tokens_of(self.tokenizer, *texts)
            examples = (examples * (drawn // len(examples) + 1))[:drawn]
            clock.lap("setup")
            for start in range(0, drawn, job["batch_size"]):
                for ids, keep in _rows(examples[start : start + job["batch_size"]]):
                    embeddings = self.model.get_input_embeddings()(ids).detach().requires_grad_()
                    last = torch.arange(-keep, 0)  # indices: a slice's product with a gradient is ten times slower
                    self.model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=last).logits.sum().backward()
            clock.lap("train")
            self.scores(self.model, (tested["prompts"], tested["choices"], tested["labels"]))
            clock.lap("evaluate")
            return clock.seconds, []

        return run

    def score(self, job: dict[str, Any]) -> Callable[[], Result]:
        run = super().score(job)
        return lambda: (run()[0], [])

    def scores(self, model: nn.Module, texts: tuple[Sequence[str], Sequence[str], Sequence[int]]) -> list[float]:
        with torch.inference_mode():
            for ids, keep in _rows(tokens_of(self.tokenizer, *texts)):
                model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        return []

    def generate(self, job: dict[str, Any]) -> Callable[[], Result]:
        run = super().generate(job)
        return lambda: (run()[0], [])

    def mixed(self, job: dict[str, Any]) -> Callable[[], Result]:
        run = super().mixed(job)
        return lambda: (run()[0], [])

    def mixed_logits(self, model: Any, ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        return self.last_logits(model, ids)

    def load_adapter(self, job: dict[str, Any]) -> Callable[[], Result]:
        import tempfile

        from safetensors.torch import load_file, save_file

        from .peers import adapted_modules, size_of

        folder = tempfile.TemporaryDirectory()
        file = Path(folder.name, "adapter.safetensors")
        save_file({name: torch.ones(size_of(name, module)) for name, module in adapted_modules(self.model)}, file)

        def run() -> Result:
            clock = Clock()
            for _ in range(job["adapters"]):
                load_file(Path(folder.name, "adapter.safetensors"))
            clock.lap("load")
            return clock.seconds, []

        return run


def _rows(examples: Sequence[Example]) -> Iterator[tuple[torch.Tensor, int]]:
    """Token ids as rows of one length, as many tokens as are needed, and how many logits of each row."""
    shared = shared_beginning(examples)
    if shared:
        yield torch.tensor([examples[0][0][:shared]]), 1
    start = 0
    while start < len(examples):
        size = 1
        while start + size < len(examples) and needed(examples[start : start + size + 1], shared)[0] <= _TOKENS:
            size += 1
        read, predicted = needed(examples[start : start + size], shared)
        length = max(1, round(read / size))
        yield torch.ones((size, length), dtype=torch.long), min(length, max(1, round(predicted / size)))
        start += size
