"""Accuracy and cost of zero-shot, in-context learning and T-Few on one task and model: `Comparison`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ia3.adapter.checkpoint import save_adapter
from ia3.adapter.model import IA3Model
from ia3.adapter.moved import moved
from ia3.adapter.pretrained import HEADED, task_type
from ia3.adapter.stored import RECIPE_NAME, REPORT_NAME, StoredAdapter
from ia3.errors import InputError
from ia3.evaluation import costs, icl
from ia3.evaluation.balance import Balance, balancing_rows, can_balance
from ia3.evaluation.learner import Learner
from ia3.evaluation.prediction import predict
from ia3.evaluation.progress import Progress
from ia3.evaluation.report.findings import Findings, Method
from ia3.evaluation.report.page import page_of
from ia3.evaluation.report.plots import can_draw
from ia3.evaluation.results import OF_TEXTS
from ia3.evaluation.running import with_adapters
from ia3.files import WEIGHTS_NAME, replacing, write_json
from ia3.scoring.prefix import Prefix
from ia3.scoring.question import row_length
from ia3.scoring.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ia3.task.task import Row
    from ia3.training.recipe import Recipe

# Default numbers of shots, if the rows and the model's context allow them.
USUAL_SHOTS = (8, 16)

ZERO_SHOT, T_FEW, TRAINED = "zero-shot", "t-few", "trained"

BESIDE_METRICS = (
    "method",
    "balanced",
    "inference_flops",
    "inference_flops_uncached",
    "inference_flops_estimate",
    "training_flops",
    "training_flops_estimate",
    "kv_cache_bytes",
    "disk_bytes",
    "seconds",
    "once_seconds",
    "tokens",
    "examples",
    "recipe",
    "steps",
)
"""What a method's row has beside its metrics."""

# In the picture; shots have others.
_MARKS = {ZERO_SHOT: ("tab:gray", "s"), T_FEW: ("tab:red", "*"), TRAINED: ("tab:red", "*")}


@dataclass
class Comparison:
    """Compares methods on one task and model, with the same rows. See `TextComparison` for a task whose answer is text.

        comparison = Comparison(base, tokenizer, task, examples, test, recipe=Recipe.small())
        rows = comparison.run(comparison.shots([4, 8]))

    Attributes:
        base: the model; `t_few` adds an adapter to it.
        tokenizer: its tokenizer.
        task: the task of the rows.
        examples: labelled rows for training and for shots.
        test: the test rows.
        recipe: how T-Few trains; it also decides how answers are scored for all methods.
        seed: decides the shots and the order of training.
        adapter: a trained adapter to evaluate; None: train one.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Any
    examples: Sequence[Row]
    test: Sequence[Row]
    recipe: Recipe
    seed: int = 0
    adapter: StoredAdapter | None = None

    # What the method that trains is called.
    METHOD: ClassVar[str] = T_FEW

    # How costs are measured.
    COSTS_FROM: ClassVar[str] = "on all test rows, in batches; shots are read once"

    def __post_init__(self) -> None:
        self._progress = Progress()
        self._answers: dict[str, list[Any]] = {}
        self._moved: dict[str, dict[int, float]] = {}
        self.parameters = costs.count_parameters(self.base)
        self.cache_bytes = costs.cache_bytes_per_token(self.base)

    def shots(self, counts: Sequence[int] | None = None) -> dict[int, list[Row]]:
        """Number of shots → the shots. By default, those of the usual numbers that fit.

        Raises:
            InputError: a given number does not fit into the model's context.
        """
        if not self.reads_examples:
            if counts:
                raise InputError(
                    f"Expected no shots for {type(self.base).__name__}: a classifier cannot read examples",
                    "leave out",
                    argument="shots",
                )
            return {}
        wanted = counts or [count for count in USUAL_SHOTS if count <= len(self.examples)]
        found = {}
        for count in wanted:
            some = icl.draw_shots(self.examples, self.task, count, self.seed)
            fit = icl.fitting(self.base, self.tokenizer, self.task, some, self.test)
            if fit == count:
                found[count] = some
            elif counts is not None:
                raise InputError(
                    f"Expected shots that fit into the model's context with the longest test row, found {count}, of which "
                    f"{fit} fit",
                    "ask for fewer",
                    argument="shots",
                )
        return found

    def run(self, shots: Mapping[int, Sequence[Row]], progress: Progress | None = None) -> list[dict[str, Any]]:
        """Accuracy and costs, one dictionary per method.

        "accuracy" and "macro_f1" are those of the paper's methods. "balanced" has those of untrained methods at their best:
        without the answers' own frequency, which is estimated on training rows (see `Balance`); otherwise None.

        Args:
            shots: number of shots → the shots; see `shots`.
            progress: shows the progress.
        """
        self._progress = progress or Progress()
        return [self.zero_shot(), *map(self.in_context, shots.values()), self.trained()]

    def zero_shot(self) -> dict[str, Any]:
        """The model without training or shots."""
        measured = self._measure(ZERO_SHOT, self.base)
        return self._row(ZERO_SHOT, measured, balanced=self._balanced(ZERO_SHOT, measured, self.examples))

    def in_context(self, shots: Sequence[Row]) -> dict[str, Any]:
        """The model with shots before each prompt."""
        count, text = len(shots), icl.shots_text(self.task, shots)
        started = time.perf_counter()
        prefix = Prefix(self.base, self.tokenizer, text)
        seconds = time.perf_counter() - started
        with costs.count_flops() as counter:  # a second time, because counting is slow and would change the timing
            Prefix(self.base, self.tokenizer, text)
        measured = self._measure(f"{count}-shot", self.base, prefix)
        # The model reads the shots' answers, so other examples tell the balance; shots do if there are no others.
        ids = {id(row) for row in shots}
        others = [row for row in self.examples if id(row) not in ids] or self.examples
        again = counter.get_total_flops() if prefix.is_cached else 0
        return self._row(
            f"{count}-shot",
            measured,
            inference_flops_uncached=measured.flops + again,
            disk_bytes=len(prefix.text.encode()),
            examples=count,
            once_seconds=seconds,
            balanced=self._balanced(f"{count}-shot", measured, others, prefix),
        )

    def trained(self) -> dict[str, Any]:
        """The model with an adapter: the given one, or one that is trained here."""
        if self.adapter is not None:
            model = IA3Model.from_pretrained(self.base, self.adapter)
            size = Path(self.adapter.vectors_file()).stat().st_size
            more = {"disk_bytes": size, **self._recorded(model, self.adapter)}
        else:
            model, more = self._train()
        self._moved = moved(model, model.active_adapters[0])
        return self._with_adapter(model, **more)

    def _with_adapter(self, model: Any, **more: Any) -> dict[str, Any]:
        return self._row(self.METHOD, self._measure(self.METHOD, model), **more)

    def _train(self) -> tuple[Any, dict[str, Any]]:
        recipe = self.recipe
        model = with_adapters(self.base, {"default": recipe.place(self.base, self.task)}, recipe)
        with tempfile.TemporaryDirectory() as scratch:
            learner = Learner(model, self.tokenizer, self.task, self.examples, recipe, self.seed, scratch)
            trainer, _, seconds = learner.train(self._progress, "training")
            save_adapter(model, scratch)
            size = Path(scratch, WEIGHTS_NAME).stat().st_size
        steps = trainer.steps_of("default")
        return model.eval(), {
            **self._training_flops(model, recipe, len(self.examples), steps),
            "disk_bytes": size,
            "examples": len(self.examples),
            "once_seconds": seconds,
            "recipe": recipe.name,
            "steps": steps,
        }

    def _recorded(self, model: IA3Model, adapter: StoredAdapter) -> dict[str, Any]:
        """The costs of an adapter's training; None for each that its folder does not record."""
        found = adapter.metrics
        steps, examples = found.get("steps"), found.get("train_examples")
        flops: dict[str, Any] = dict.fromkeys(("training_flops", "training_flops_estimate"))
        if steps and examples and adapter.text(RECIPE_NAME) is not None:
            flops = self._training_flops(model, self.recipe, examples, steps)
        seconds = found.get("train_seconds")
        return {
            **flops,
            "examples": examples,
            "once_seconds": None if seconds is None else seconds / (found.get("trained_at_once") or 1),
            "recipe": found.get("recipe"),
            "steps": steps,
        }

    def _training_flops(self, model: IA3Model, recipe: Recipe, examples: int, steps: int) -> dict[str, float]:
        """The FLOPs of training steps on examples: counted, and by the paper's estimate."""
        seen = costs.examples_seen(examples, recipe, steps)
        questions = Scorer(self.base, self.tokenizer).questions(self.task.wordings(self.examples))
        tokens = seen * sum(map(row_length, questions)) / len(questions)
        flops = costs.example_flops(model, self.tokenizer, self.task, self.examples, recipe)
        return {
            "training_flops": examples * flops.once + seen * flops.each,
            "training_flops_estimate": costs.estimated_flops(self.parameters, tokens, self._both, training=True),
        }

    def _measure(self, title: str, model: Any, prefix: Any = None) -> costs.Measured:
        stage = self._progress.stage(title, len(self.test))
        measured = costs.measure(
            model,
            self.tokenizer,
            self.task,
            self.test,
            prefix,
            lambda done: stage.advance(len(done)),
            self.recipe,
        )
        stage.note(f"accuracy {self._scores(measured)['accuracy']:.1%}")
        self._answers[title] = measured.predictions
        return measured

    def _balanced(
        self, title: str, measured: costs.Measured, rows: Sequence[Row], prefix: Prefix | None = None
    ) -> dict[str, float] | None:
        """The metrics with balanced answers, estimated on labelled training rows; None if they differ from row to row."""
        if not can_balance(self.task):
            return None
        rows = balancing_rows(rows)
        stage = self._progress.stage(f"{title}, balancing", len(rows))

        def advance(done: list[int]) -> None:
            stage.advance(len(done))

        found = predict(self.base, self.tokenizer, self.task, rows, advance, recipe=self.recipe, prefix=prefix)
        balance = Balance.fit(found, [self.task.label(row) for row in rows])
        balanced = balance.balanced(measured.predictions)
        self._answers[_balanced(title)] = balanced
        scores = self._scores(replace(measured, predictions=balanced))
        stage.note(f"accuracy {scores['accuracy']:.1%}")
        return scores

    def _scores(self, measured: costs.Measured) -> dict[str, float]:
        labels = [self.task.label(row) for row in self.test]
        return self.task.metrics(labels, [prediction.best for prediction in measured.predictions])

    @property
    def headline(self) -> str:
        """The name of the metric that the picture shows."""
        return "accuracy"

    @property
    def reads_examples(self) -> bool:
        """Whether the model can read shots; an encoder cannot."""
        return task_type(self.base) not in HEADED

    @property
    def _both(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    def _row(self, method: str, measured: costs.Measured, **more: Any) -> dict[str, Any]:
        return {"method": method, **self._scores(measured), **self._beside(measured), **more}

    def _beside(self, measured: costs.Cost) -> dict[str, Any]:
        return {
            "balanced": None,
            "inference_flops": measured.flops,
            "inference_flops_uncached": measured.flops,
            "inference_flops_estimate": costs.estimated_flops(self.parameters, measured.tokens, self._both),
            "training_flops": 0,
            "training_flops_estimate": 0,
            "kv_cache_bytes": round(self.cache_bytes * measured.tokens),
            "disk_bytes": 0,
            "seconds": measured.seconds,
            "once_seconds": 0.0,
            "tokens": measured.tokens,
            "examples": 0,
        }

    def findings(self, rows: Sequence[Mapping[str, Any]]) -> Findings:
        """What the report on the result of `run` is made of."""
        methods = []
        for row in rows:
            name = row["method"]
            once = row["once_seconds"] or None
            costs = row["seconds"], row["inference_flops"], once, row["training_flops"] or None
            scores = {key: value for key, value in row.items() if key not in BESIDE_METRICS}
            methods.append(Method(name, scores, self._answers[name], *costs))
            if row["balanced"] is not None:
                methods.append(Method(_balanced(name), row["balanced"], self._answers[_balanced(name)], *costs))
        return Findings(
            self.task,
            f"{self.task.name}: methods compared",
            {
                "base model": Path(str(self.base.name_or_path)).name,
                "parameters": f"{self.parameters:,}",
                "recipe": self.recipe.name,
                "training examples": len(self.examples),
                "test rows": len(self.test),
                "seed": self.seed,
            },
            self.examples,
            self.test,
            methods,
            methods[-1],
            moved=self._moved,
            costs_from=self.COSTS_FROM,
        )

    def save(self, folder: Path, rows: Sequence[Mapping[str, Any]], report: Path | None = None) -> None:
        """Write the result of `run` to a folder: a picture, compare.png, the numbers, compare.json, and a report.

        Args:
            folder: the folder.
            rows: the result of `run`.
            report: the report's file; None: report.html in the folder.
        """
        page = page_of(self.findings(rows))
        settings = {
            "model": self.base.name_or_path,
            "task": self.task.name,
            "parameters": self.parameters,
            "train_examples": len(self.examples),
            "test_rows": len(self.test),
            "seed": self.seed,
        }
        title = f"{self.task.name}, {Path(str(self.base.name_or_path)).name}, {len(self.test)} test rows"
        picture = folder / "compare.png"
        with ExitStack() as files:
            if can_draw("compare.png and the report's plots are"):
                draw(files.enter_context(replacing(picture)), rows, self.headline, title)
            else:
                picture.unlink(missing_ok=True)  # that of an earlier run
            written = files.enter_context(replacing(report or folder / REPORT_NAME))
            written.write_text(page, encoding="utf-8")
            write_json(folder / "compare.json", {**settings, "rows": rows})


def _balanced(method: str) -> str:
    """The name of an untrained method with balanced answers."""
    return f"{method}, balanced"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """Draw a metric against FLOPs per example, on a logarithmic scale; untrained methods with balanced answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    percent = all(0 <= row[metric] <= 1 for row in rows)  # not so for a metric of the user's
    for row in rows:
        cost, again = row["inference_flops"], row["inference_flops_uncached"]
        score = (100 if percent else 1) * (row["balanced"] or row)[metric]
        color, marker = _MARKS.get(row["method"], ("tab:blue", "o"))
        if again > cost:
            axes.plot([cost, again], [score, score], ":", color=color, linewidth=1)
            axes.plot(again, score, marker, color=color, markerfacecolor="white", markersize=8)
        axes.plot(cost, score, marker, color=color, markersize=14 if marker == "*" else 8)
        axes.annotate(row["method"], (cost, score), xytext=(6, -14 if marker == "*" else 6), textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_xlabel("FLOPs an example at inference (hollow: shots read again for each example)")
    axes.set_ylabel(OF_TEXTS.get(metric, metric) + (", %" if percent else ""))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
