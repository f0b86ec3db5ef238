"""What others do: the same jobs by padded rows and full logits, with PEFT and as in the code of T-Few's authors.

Nothing here uses the package's own scoring, loss or adapters, so that the results are a check on them.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Example = tuple[list[int], list[list[int]], int]
"""A prompt's tokens, those of its answer choices, and which of them is right."""

Result = tuple[dict[str, float], list[float]]
"""Seconds of each phase of a job, and numbers that all columns have to agree on."""

ADAPTED = ("k_proj", "v_proj", "down_proj")
FEEDFORWARD = ("down_proj",)

# A padded batch has at most so many (prompt + choice) rows: eight examples of 77 choices do not fit into 24 GiB.
PASS_ROWS = 128


def vector(module: str, size: int, number: int = 0) -> torch.Tensor:
    """The vector of a module in the adapter of that number, the same in every column."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{module} {number}".encode()))
    return 1 + 0.1 * torch.randn(size, generator=generator)


def tokens_of(tokenizer: Any, prompts: Sequence[str], choices: Sequence[str], labels: Sequence[int]) -> list[Example]:
    """Texts as token ids; choices continue a prompt, and neither is closed."""
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in choices]
    encoded = tokenizer(list(prompts))["input_ids"]
    return [(prompt, answers, label) for prompt, label in zip(encoded, labels, strict=True)]


def padded_log_probs(model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each (prompt + choice) as a padded row, and the logits of the whole vocabulary at all of its tokens.

    Returns:
        The log-probability of each choice token, 0 elsewhere, and where there is one: (B, C, L - 1) both.
    """
    rows = [(prompt, choice) for prompt, choices, _ in examples for choice in choices]
    length = max(len(prompt) + len(choice) for prompt, choice in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, choice) in enumerate(rows):
        end = len(prompt) + len(choice)
        ids[row, :end] = torch.tensor(prompt + choice)
        mask[row, :end] = 1
        targets[row, len(prompt) : end] = ids[row, len(prompt) : end]
    device = next(model.parameters()).device
    ids, mask, targets = ids.to(device), mask.to(device), targets.to(device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return _of_targets(logits[:, :-1], targets[:, 1:], len(examples))


def repeated_log_probs(model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """As T-Few's authors do with an encoder: prompts are read once, and what was read is repeated for each choice.

    In a decoder-only model that is the prompt's keys and values. Its last token stands where a decoder's start token
    does; choices are padded to one length, and the logits are of the whole vocabulary at all of their tokens.

    Returns:
        As `padded_log_probs`, (B, C, T).
    """
    count = len(examples[0][1])
    width = max(len(prompt) for prompt, _, _ in examples) - 1
    longest = max(len(choice) for _, choices, _ in examples for choice in choices)
    read = torch.zeros((len(examples), width), dtype=torch.long)
    read_mask = torch.zeros_like(read)
    ids = torch.zeros((len(examples), count, longest), dtype=torch.long)
    targets = torch.full_like(ids, -100)
    first = torch.tensor([len(prompt) - 1 for prompt, _, _ in examples])
    for row, (prompt, choices, _) in enumerate(examples):
        if len(prompt) > 1:
            read[row, -len(prompt) + 1 :] = torch.tensor(prompt[:-1])
            read_mask[row, -len(prompt) + 1 :] = 1
        for column, choice in enumerate(choices):
            ids[row, column, : len(choice)] = torch.tensor([prompt[-1], *choice[:-1]])
            targets[row, column, : len(choice)] = torch.tensor(choice)
    mask = (targets != -100).long().flatten(0, 1)
    known: dict[str, Any] = {}
    if width:
        positions = (read_mask.cumsum(-1) - 1).clamp(min=0)
        cache = model(
            input_ids=read, attention_mask=read_mask, position_ids=positions, use_cache=True, logits_to_keep=1
        ).past_key_values
        cache.batch_repeat_interleave(count)
        known["past_key_values"] = cache
        mask = torch.cat([read_mask.repeat_interleave(count, 0), mask], -1)
    positions = (first[:, None] + torch.arange(longest)).repeat_interleave(count, 0)
    logits = model(input_ids=ids.flatten(0, 1), attention_mask=mask, position_ids=positions, **known).logits
    return _of_targets(logits, targets.flatten(0, 1), len(examples))


def _of_targets(logits: torch.Tensor, targets: torch.Tensor, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100)
    shape = (examples, -1, targets.shape[-1])
    return found.view(shape), (targets != -100).view(shape)


def mean_scores(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """β, the mean log-probability of each choice's tokens: (B, C)."""
    return log_probs.sum(-1) / mask.sum(-1)


def three_losses(log_probs: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """T-Few's L_LM + L_UL + L_LN (Liu et al. 2022, section 3.2), example by example; a mean over them.

    As in the package, L_UL's probabilities are times 0.999, so that it is finite.
    """
    losses = []
    for found, exists, label in zip(log_probs, mask, labels.tolist(), strict=True):
        scores = mean_scores(found, exists)
        wrong = exists.clone()
        wrong[label] = False
        unlikelihood = -torch.log(1 - 0.999 * found[wrong].exp()).mean() if wrong.any() else 0.0
        losses.append(-scores[label] + unlikelihood - scores.log_softmax(0)[label])
    return torch.stack(losses).mean()


class Clock:
    """Seconds of phases."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What passed since the last lap belongs to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def timed_steps() -> Any:
    """A callback that adds up the seconds of a Trainer's optimizer steps, and keeps their losses."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        seconds = 0.0

        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    return Steps()


def training_arguments(folder: str, steps: int, batch_size: int, micro_batch: int) -> Any:
    """The paper's optimizer and schedule, for `transformers.Trainer`."""
    from transformers import TrainingArguments

    size = min(batch_size, micro_batch)
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=-(-batch_size // size),
        optim="adafactor",
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.06 * steps),
        remove_unused_columns=False,
        **quiet_arguments(),
    )


def quiet_arguments() -> dict[str, Any]:
    """`TrainingArguments` of every column: nothing is written or printed but the losses."""
    return {
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_first_step": True,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


def train(model: nn.Module, examples: Sequence[Example], steps: int, batch_size: int, log_probs: Callable) -> Any:
    """`transformers.Trainer` with the three losses over a padded batch; returns the callback of its steps."""
    from transformers import Trainer

    class ThreeLosses(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = torch.tensor([label for _, _, label in inputs["examples"]])
            found, mask = log_probs(model, inputs["examples"])
            return three_losses(found, mask, labels)

    callback = timed_steps()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, steps, batch_size, PASS_ROWS // len(examples[0][1]) or 1)
        trainer = ThreeLosses(
            model,
            arguments,
            data_collator=lambda some: {"examples": some},
            train_dataset=list(examples),  # type: ignore[arg-type]
            callbacks=[callback],
        )
        trainer.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        trainer.train()  # type: ignore[call-arg]
    return callback


def adapted_modules(base: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The modules that have vectors."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ADAPTED:
            yield name, module


def size_of(name: str, module: nn.Linear) -> int:
    """How many numbers a module's vector has: its outputs' are scaled, or a feed-forward's inputs."""
    return module.in_features if name.rpartition(".")[2] in FEEDFORWARD else module.out_features


def touch(model: nn.Module) -> None:
    """Read something of every page of the weights: until then a file that is mapped into memory is not there."""
    for parameter in model.parameters():
        parameter.detach().flatten()[::1024].sum()


class Column:
    """One way to do the jobs: `prepare` gives what is timed. Subclasses say how.

    Args:
        folder: the base model's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.import_libraries()
        self.model, self.tokenizer = self.load()

    def import_libraries(self) -> None:
        """What jobs would otherwise import at their first use: that has a row of its own."""
        from transformers import Trainer

        assert Trainer

    def load(self) -> tuple[Any, Any]:
        """The base model, frozen, and its tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(self.folder)

    def wake(self) -> None:
        """Start threads and libraries, once, before memory is looked at."""
        touch(self.model)
        embeddings = self.model.get_input_embeddings()(torch.ones((1, 2), dtype=torch.long))
        self.model(inputs_embeds=embeddings.detach().requires_grad_(), use_cache=False).logits.sum().backward()

    def prepare(self, job: dict[str, Any]) -> Callable[[], Result]:
        """What has to be there before a job is timed, and the job.

        Args:
            job: its `kind` and what it works on, see `Row.job`.
        """
        return getattr(self, job["kind"])(job)

    # Jobs.

    def load_model(self, job: dict[str, Any]) -> Callable[[], Result]:
        """Load the base model and put an adapter into it."""

        def run() -> Result:
            clock = Clock()
            model, _ = self.load()
            touch(self.adapt(model))
            clock.lap("load")
            return clock.seconds, []

        return run

    def train(self, job: dict[str, Any]) -> Callable[[], Result]:
        """Put an adapter into the base model, train it, evaluate it."""
        point = job["points"][0]

        def run() -> Result:
            clock = Clock()
            model = self.adapt(self.model)
            steps, examples = job["steps"], (point["prompts"], point["choices"], point["labels"])
            callback = train(model, tokens_of(self.tokenizer, *examples), steps, job["batch_size"], self.log_probs)
            clock.lap("setup")
            tested = job["tested"]
            scores = self.scores(model.eval(), (tested["prompts"], tested["choices"], tested["labels"]))
            clock.lap("evaluate")
            clock.seconds["setup"] -= callback.seconds
            clock.seconds["train"] = callback.seconds
            self.release(model)
            return clock.seconds, [*callback.losses, *scores]

        return run

    def score(self, job: dict[str, Any]) -> Callable[[], Result]:
        """Score all choices of all prompts, with an adapter."""
        model = self.randomized(self.adapt(self.model)).eval()
        self.scores(model, (["one"], job["points"][0]["choices"][:2], [0]))  # what libraries do once

        def run() -> Result:
            clock, found = Clock(), []
            for point in job["points"]:
                found += self.scores(model, (point["prompts"], point["choices"], point["labels"]))
                clock.lap(point["name"])
            return clock.seconds, found

        return run

    def generate(self, job: dict[str, Any]) -> Callable[[], Result]:
        """New tokens behind prompts of one length, greedily, with an adapter."""
        model = self.randomized(self.adapt(self.model)).eval()
        ids = self.ids_of(job["prompts"], job["length"])

        def run() -> Result:
            clock = Clock()
            new = job["new"]
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            clock.lap("generate")
            return clock.seconds, found[:, ids.shape[1] :].flatten().float().tolist()

        return run

    def mixed(self, job: dict[str, Any]) -> Callable[[], Result]:
        """A batch whose rows have adapters of their own: log-probabilities behind each row.

        Every point says how many adapters are resident; rows take them in turn.
        """
        ids = self.ids_of(job["prompts"], job["length"])
        model = self.adapt(self.model).eval()

        def run() -> Result:
            seconds, found = {}, []
            for point in job["points"]:
                names = [f"n{row % point['resident']}" for row in range(len(ids))]
                self.hold(model, point["resident"])
                clock = Clock()
                with torch.inference_mode():
                    logits = self.mixed_logits(model, ids, names)
                clock.lap(point["name"])
                seconds |= clock.seconds
                found += logits.log_softmax(-1)[:, :4].flatten().tolist()
            return seconds, found

        return run

    def load_adapter(self, job: dict[str, Any]) -> Callable[[], Result]:
        """Adapters from disk, each under a name of its own."""
        return self._many(job, "load")

    def switch_adapter(self, job: dict[str, Any]) -> Callable[[], Result]:
        """One adapter after another is made the active one."""
        return self._many(job, "switch")

    def _many(self, job: dict[str, Any], phase: str) -> Callable[[], Result]:
        model = self.randomized(self.adapt(self.model)).eval()
        folder = tempfile.TemporaryDirectory()
        self.save(model, Path(folder.name))
        names = [f"n{number}" for number in range(job["adapters"])]

        def run() -> Result:
            clock = Clock()
            for name in names:
                self.load_one(model, Path(folder.name), name)
            clock.lap("load")
            for name in names:
                self.switch(model, name)
            clock.lap("switch")
            self.switch(model, "default")
            for name in names:
                self.delete(model, name)
            return {phase: clock.seconds[phase]}, []

        return run

    def ids_of(self, prompts: Sequence[str], length: int) -> torch.Tensor:
        """The first tokens of prompts, all equally many."""
        found = self.tokenizer(list(prompts))["input_ids"]
        return torch.tensor([(ids * length)[:length] for ids in found])

    # What the columns do differently.

    def adapt(self, model: nn.Module) -> Any:
        """The model with a new adapter, called "default", in it."""
        raise NotImplementedError

    def release(self, model: Any) -> None:
        """Take all adapters out again."""
        raise NotImplementedError

    def randomized(self, model: Any, number: int = 0, name: str = "default") -> Any:
        """The model, with the vectors of that number in its adapter."""
        raise NotImplementedError

    def log_probs(self, model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each choice token, with gradients."""
        return padded_log_probs(model, examples)

    def scores(self, model: nn.Module, texts: tuple[Sequence[str], Sequence[str], Sequence[int]]) -> list[float]:
        """All scores of all prompts, in their order, in batches that people use."""
        examples = tokens_of(self.tokenizer, *texts)
        size = max(1, min(8, PASS_ROWS // len(texts[1])))
        found = []
        with torch.inference_mode():
            for start in range(0, len(examples), size):
                found += mean_scores(*self.log_probs(model, examples[start : start + size])).flatten().tolist()
        return found

    def mixed_logits(self, model: Any, ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """The logits behind each row (R, vocabulary), a row by the adapter of its name."""
        rows = []
        for row, name in enumerate(names):
            self.switch(model, name)
            rows.append(self.last_logits(model, ids[row : row + 1]))
        return torch.cat(rows)

    def last_logits(self, model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """The logits behind each row."""
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **options).logits[:, -1]

    def hold(self, model: Any, count: int) -> None:
        """Have adapters n0, n1, … of as many numbers in the model."""
        raise NotImplementedError

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter."""
        model.save_pretrained(folder)

    def load_one(self, model: Any, folder: Path, name: str) -> None:
        """Load an adapter."""
        model.load_adapter(str(folder), name)

    def switch(self, model: Any, name: str) -> None:
        """Make an adapter the active one."""
        model.set_adapter(name, inference_mode=True)

    def delete(self, model: Any, name: str) -> None:
        """Remove an adapter."""
        model.delete_adapter(name)


class WithVectors(Column):
    """What ours and PEFT's models have in common: names, but for what stands before the base model's."""

    prefix = "base_model.model."

    def release(self, model: Any) -> None:
        model.unload()
        self.model.requires_grad_(False)
        gc.collect()

    @torch.no_grad()
    def randomized(self, model: Any, number: int = 0, name: str = "default") -> Any:
        for key, parameter in model.named_parameters():
            module, found, adapter = key.removeprefix(self.prefix).partition(".ia3_l.")
            if found and adapter == name:
                parameter.copy_(vector(module, parameter.numel(), number).view_as(parameter))
        return model


class Peft(WithVectors):
    """PEFT's IA3Model, transformers.Trainer, padded rows, full logits; adapters are switched for each row."""

    def import_libraries(self) -> None:
        super().import_libraries()
        import peft

        assert peft.get_peft_model

    @staticmethod
    def config() -> Any:
        """The same modules as ours."""
        import peft

        return peft.IA3Config(target_modules=list(ADAPTED), feedforward_modules=list(FEEDFORWARD))

    def adapt(self, model: nn.Module) -> Any:
        import peft

        return peft.get_peft_model(model, self.config())  # type: ignore[arg-type]

    def hold(self, model: Any, count: int) -> None:
        for number in range(count):
            if f"n{number}" not in model.peft_config:
                model.add_adapter(f"n{number}", self.config())
                self.randomized(model, number, f"n{number}")


class Authors(Column):
    """The algorithm of T-Few's authors, written anew: vectors that scale outputs, and prompts that are repeated."""

    def adapt(self, model: nn.Module) -> Any:
        self.vectors: dict[str, nn.Parameter] = {}
        self.hooks: list[Any] = []
        for name, module in adapted_modules(model):
            scale = self.vectors[name] = nn.Parameter(torch.ones(size_of(name, module)))
            module.register_parameter("ia3_scale", scale)
            if name.rpartition(".")[2] in FEEDFORWARD:
                self.hooks.append(module.register_forward_pre_hook(lambda _, args, v=scale: (args[0] * v,)))
            else:
                self.hooks.append(module.register_forward_hook(lambda _, args, out, v=scale: out * v))
        return model

    def release(self, model: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        for _, module in adapted_modules(model):
            del module.ia3_scale
        gc.collect()

    @torch.no_grad()
    def randomized(self, model: Any, number: int = 0, name: str = "default") -> Any:
        for module, parameter in self.vectors.items():
            parameter.copy_(vector(module, parameter.numel(), number))
        return model

    def log_probs(self, model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        return repeated_log_probs(model, examples)
