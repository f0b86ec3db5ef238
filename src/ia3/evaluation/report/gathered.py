"""What an experiment gathers for a trial's report: `Gathered`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.evaluation.doubts import HeldOut
from ia3.evaluation.prediction import predict
from ia3.evaluation.report.findings import Findings, Method, Point
from ia3.evaluation.results import METHODS, OF_OPINIONS
from ia3.opinions.opinions import VECTORS, Opinions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.costs import RowCost
    from ia3.evaluation.experiment import Trial
    from ia3.training.recipe import Recipe

# What a row costs is measured on so many test rows, which takes a second: counting is slow, however few they are.
_COSTED = 2

# The methods in the order in which the report lists them.
_LISTED = dict.fromkeys(("trained", *OF_OPINIONS, *METHODS))


@dataclass
class Gathered:
    """What is learnt of a trial that its metrics do not show.

    Attributes:
        answers: key of a method in metrics.json → what it says to each test row, as of `Method`.
        held_out: what cross-validation says to training rows.
        points: of the learning curve.
        costs: key of a method → what a row costs.
        costs_from: where that was measured, for people.
    """

    answers: dict[str, Sequence[Any]] = field(default_factory=dict)
    held_out: HeldOut | None = None
    points: list[Point] = field(default_factory=list)
    costs: Mapping[str, RowCost] = field(default_factory=dict)
    costs_from: str = ""

    def findings(
        self,
        trial: Trial,
        results: Mapping[str, Any],
        recipe: Recipe,
        moved: Mapping[str, Mapping[int, float]],
        at_once: int = 1,
    ) -> Findings:
        """What the report is made of.

        Args:
            trial: what was trained.
            results: the content of metrics.json.
            recipe: how it was trained.
            moved: as of `ia3.adapter.moved`.
            at_once: how many adapters were trained in the time that the results name.
        """
        methods: dict[str, Method] = {}
        for key in _LISTED:
            scores = results.get("opinions", {}).get(key) if key in OF_OPINIONS else results.get(key)
            if scores is None or key not in self.answers:
                continue
            method = Method((OF_OPINIONS | METHODS)[key], scores, self.answers[key])
            if key in self.costs:
                method = replace(method, seconds=self.costs[key].seconds, flops=self.costs[key].flops or None)
            if key in (VECTORS, "trained"):
                method = replace(method, once_seconds=results["train_seconds"] / at_once)
            methods[key] = method
        facts: dict[str, Any] = {
            "base model": Path(results["model"]).name,
            "recipe": recipe.name,
            "training examples": len(trial.examples),
            "test rows": len(trial.test),
            "steps": results["steps"],
            "trained numbers": f"{results['trainable_parameters']:,}" if results["steps"] else 0,
            "seed": trial.seed,
        }
        if "opinions" in results:
            weights = results["opinions"]["weights"].items()
            facts["weights"] = ", ".join(f"{name} {weight:.2f}" for name, weight in weights)
        return Findings(
            trial.task,
            trial.titled(trial.task.name),
            facts,
            trial.examples,
            trial.test,
            [*methods.values()],
            methods.get("trained"),
            self.held_out,
            self.points,
            moved if results["steps"] else {},
            self.costs_from,
        )

    def measure_costs(
        self,
        trial: Trial,
        model: IA3Model,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        adapter: str | None,
        opinions: Opinions | None,
    ) -> None:
        """Measure what a row costs the untrained model, each head and all together, each on its own, on a few test rows.

        Args:
            trial: has labels, and test rows.
            model, tokenizer, recipe: as of `predict`.
            adapter: the trial's; None: the active one.
            opinions: the trial's.
        """
        from ia3.evaluation.costs import row_cost

        task = trial.task
        # Short and long ones.
        ordered = sorted(trial.test, key=lambda row: len(task.prompt(row)))
        count = min(_COSTED, len(ordered))
        rows = [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
        names = None if adapter is None else [adapter] * count

        def asking(names: list[str] | None, opinions: Opinions | None) -> Callable[[list[Any]], Any]:
            return lambda some: predict(
                model, tokenizer, task, some, adapter_names=names, recipe=recipe, opinions=opinions
            )

        with model.disable_adapter():
            found = {"zero_shot": row_cost(asking(None, None), rows)}
        found["zero_shot_balanced"] = found["zero_shot"]
        found["trained"] = row_cost(asking(names, opinions), rows)
        for name, head in ({} if opinions is None else opinions.heads).items():
            if name in self.answers:
                alone = Opinions.of({name: 1.0}, {name: head}, encoder=opinions and opinions.encoder)
                found[name] = row_cost(asking(names, alone), rows)
        self.costs, self.costs_from = found, f"on {count} test rows in one batch"
