"""Train initial vectors on a mixture of tasks: `MixtureTrainer`."""

from __future__ import annotations

import functools
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

from ia3.errors import InputError, about, shown
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.task.rows import as_rows
from ia3.training.choices import ChoiceTrainer
from ia3.training.examples import Example
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.task import Row, Task

logger = logging.getLogger(__name__)

# The recipe of the paper's pre-training (Liu et al. 2022, section 3.4).
PRETRAINING = Recipe(name="pretraining", steps=100_000, batch_size=16, unlikelihood=0, length_normalized=0)

# The maximum of rows that count for a task's share (Sanh et al. 2021, arXiv:2110.08207, section 4).
CAP = 500_000

# Number of questions to cache as token ids, about 4 kB each.
_KEPT = 16_384


class Mixture(Dataset):
    """Draws from several tasks. A draw is a row, rendered by one template, with only its right answer.

    Task t is drawn with probability min(rows of t, cap) / Σ over tasks of the same. A task's rows come in a random
    order, a new one each time that all have been seen. Templates are drawn uniformly. The i-th draw is always the same,
    also if the tasks are given in another order. Rows are tokenized when they are drawn.

    Args:
        tasks: tasks with their labelled rows, as `as_rows` takes them.
        scorer: makes the questions.
        recipe: decides which templates are drawn, and what to do about long prompts.
        draws: the number of draws.
        cap: see above.
        seed: decides the draws.

    Raises:
        InputError: there are no tasks, a task has no rows, two have the same name, the cap is below 1, or a row does
            not fit its task; when drawn, a prompt is too long.
    """

    def __init__(
        self,
        tasks: Sequence[tuple[Task, Any]],
        scorer: Scorer,
        recipe: Recipe,
        draws: int,
        cap: int = CAP,
        seed: int = 0,
    ) -> None:
        names = [task.name for task, _ in tasks]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice or not names:
            found = f"{shown(twice)} twice; change `name:` in one" if twice else "none"
            raise InputError(f"Expected tasks with names that differ, one at least, found {found}.")
        if cap < 1:
            raise InputError(f"Expected a cap of at least 1 row, found {cap}.")
        self.scorer, self.recipe, self.seed = scorer, recipe, seed
        self.tasks: list[tuple[Task, list[Row]]] = []
        for task, given in sorted(tasks, key=lambda pair: pair[0].name):
            with about(f"Task {task.name!r}"):
                rows = as_rows(given, task)
                if not rows:
                    raise InputError("Expected labelled rows, found none.")
                task.check(rows)
            self.tasks.append((task, rows))
        # How much rows of each label count, in each task.
        self._weights = [task.weights(task.label(row) for row in rows) for task, rows in self.tasks]
        sizes = np.array([min(len(rows), cap) for _, rows in self.tasks], dtype=float)
        self._shares = sizes / sizes.sum()
        # The task of each draw (draws,), and the number of earlier draws of that task (draws,).
        self._turns = np.random.default_rng(seed).choice(len(sizes), size=draws, p=self._shares)
        self._before = np.zeros(draws, dtype=np.int64)
        for index in range(len(sizes)):
            mine = self._turns == index
            self._before[mine] = np.arange(mine.sum())
        self._order = functools.lru_cache(maxsize=2 * len(sizes))(self._shuffled)
        self._question = functools.lru_cache(maxsize=_KEPT)(self._encoded)
        self._cut: set[tuple[int, int, int]] = set()
        for index, (task, _) in enumerate(self.tasks):  # finds answers with equal tokens before training
            for template in range(len(task.templates)):
                self._question(index, 0, template)

    @property
    def shares(self) -> dict[str, float]:
        """Name of a task → its probability."""
        return dict(zip((task.name for task, _ in self.tasks), self._shares.tolist(), strict=True))

    @property
    def drawn(self) -> dict[str, int]:
        """Name of a task → its number of draws."""
        counts = Counter(self._turns.tolist())
        return {task.name: counts[index] for index, (task, _) in enumerate(self.tasks)}

    @property
    def cut(self) -> int:
        """The number of prompts that were shortened to the model's context."""
        return len(self._cut)

    def draw(self, index: int) -> tuple[int, int, int]:
        """A draw as the indices of its task, row and template."""
        which = int(self._turns[index])
        task, rows = self.tasks[which]
        epoch, place = divmod(int(self._before[index]), len(rows))
        template = 0
        if self.recipe.templates == "random":
            template = random.Random(f"{self.seed} {index}").randrange(len(task.templates))
        return which, int(self._order(which, epoch)[place]), template

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, index: int) -> Example:
        which, row, template = self.draw(index)
        task, rows = self.tasks[which]
        weights = self._weights[which]
        weight = weights[task.label(rows[row], row + 1)] if weights else 1.0
        return Example((self._question(which, row, template),), weight=weight)

    def _shuffled(self, which: int, epoch: int) -> np.ndarray:
        task, rows = self.tasks[which]
        return np.random.default_rng([self.seed, epoch, *task.name.encode()]).permutation(len(rows))

    def _encoded(self, which: int, row: int, template: int) -> Question:
        task, rows = self.tasks[which]
        with about(f"Task {task.name!r}"):
            question = self.scorer.question(
                task.wording(rows[row], row + 1, template), long_prompts=self.recipe.long_prompts
            )
        if question.cut is not None:
            self._cut.add((which, row, template))
        return replace(question, choices=[question.choices[question.label]], label=0, order=None)  # type: ignore[index]


class MixtureTrainer(ChoiceTrainer):
    """Trains the active adapter on a `Mixture` of tasks with only the likelihood term (Liu et al. 2022, section 3.4).

    L_LM = -(1/T) Σ_t log p(y_t | x, y_<t), with T tokens in the right answer; the loss is the mean over the batch.

    Logs and checkpoints are those of a `TFewTrainer` with one member. The whole training counts as one epoch.

    Args:
        model: an `IA3Model` around a causal language model or an encoder-decoder.
        args: `recipe.training_arguments(…)`, or any `TrainingArguments` with `max_steps`.
        processing_class: the model's tokenizer.
        tasks: tasks with labelled rows: lists of dictionaries, DataFrames, `datasets.Dataset`s.
        recipe: decides templates and long prompts; None: `PRETRAINING`.
        cap: the maximum of rows that count for a task's share.
        **kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        InputError: the model has a classification head, whose labels are one task's, or the arguments lack `max_steps`;
            see also `Mixture`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        tasks: Sequence[tuple[Task, Any]],
        recipe: Recipe | None = None,
        cap: int = CAP,
        **kwargs: Any,
    ) -> None:
        recipe = (recipe or PRETRAINING).likelihood_only
        scorer = Scorer(model, processing_class)
        if not scorer.family.reads_answers:
            raise InputError(
                "Expected a language model for a mixture of tasks, found one with a classification head, which knows the "
                "labels of one task only; train it on that."
            )
        if args.max_steps < 1:
            raise InputError(f"Expected max_steps above 0, found {args.max_steps}; a mixture has no epochs.")
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self.mixture = Mixture(tasks, scorer, recipe, args.max_steps * batch, cap, seed)
        super().__init__(scorer, args, self.mixture, recipe, **kwargs)

    def _describe(self) -> None:
        model = self._adapted()
        if model is not None:
            for name in self.trained_adapters:
                model.adapter_folders.pop(name, None)  # they have no single task

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.mixture)  # draws are already in random order

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train`."""
        result = super().train(*args, **kwargs)
        if self.mixture.cut:
            logger.warning("%d prompts were longer than the model's context, and cut.", self.mixture.cut)
        return result
