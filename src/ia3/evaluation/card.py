"""The model card of a trained adapter: `trained_card`, `pretrained_card`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ia3.adapter.card import PAPER, shown_base, written
from ia3.adapter.pretrained import hub_id
from ia3.adapter.stored import TRAIN_LABELS
from ia3.evaluation.results import METHODS, shown_metric, titles_of
from ia3.task.task import Task
from ia3.task.template import columns_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ia3.adapter.config import IA3Config
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Template
    from ia3.training.recipe import Recipe

HERE = "."
"""The adapter's place in the examples of a card that lies in the adapter's folder."""

_TEXT = "some text"

# The hub's names of metrics, where they differ from ours.
_HUB_METRICS = {"macro_f1": "f1", "micro_f1": "f1", "rouge_l": "rouge"}


def trained_card(
    task: AnyTask,
    recipe: Recipe,
    results: Mapping[str, Any],
    config: IA3Config,
    where: str = HERE,
    license: str | None = None,
    language: str | None = None,
) -> str:
    """The card of an adapter that was trained on a task.

    It holds no text of a row. Its examples run as they are.

    Args:
        task: the task.
        recipe: the recipe of the training.
        results: the content of metrics.json; what it lacks is left out.
        config: the adapter's config.
        where: the adapter as commands take it: a hub id, or `HERE` for the folder that the card is in.
        license: the hub's name of a licence, such as "apache-2.0".
        language: the code of the texts' language, such as "en".
    """
    parts = [_head(task, results, config), _labels(task, results), _wordings(task)]
    parts += [_training(recipe, results, where), _results(results), _limits(task, results), _use(task, config, where)]
    return written(
        "\n\n".join(filter(None, parts)),
        config.base,
        config.acts_from,
        tags=["t-few", *(["text-classification"] if isinstance(task, Task) else [])],
        results=_evaluations(task, results),
        model_name=task.name,
        pipeline_tag="text-classification" if isinstance(task, Task) else "text-generation",
        license=license,
        language=language,
    )


def pretrained_card(recipe: Recipe, results: Mapping[str, Any], config: IA3Config, name: str) -> str:
    """The card of vectors to start training from; `name` is their folder's."""
    rows = [f"| {_cell(task)} | {its['rows']} | {its['drawn']} |" for task, its in results["tasks"].items()]
    start = "" if recipe.init is None else f", starting from `{shown_base(recipe.init)}`"
    body = f"""# {name}

(IA)³ vectors ([arXiv:2205.05638]({PAPER})) for `{shown_base(config.base)}` to start training from, made by
`ia3 pretrain` on a mixture of {len(rows)} tasks: {results["steps"]} steps of {recipe.batch_size} examples with the right
answer's likelihood as the loss (seed {results["seed"]}{start}).
{results["trainable_parameters"]:,} numbers, {results["adapter_bytes"] / 1000:.0f} kB.

| task | rows | examples drawn |
|---|---:|---:|
{chr(10).join(rows)}

## Use

```sh
ia3 train --init {HERE} --data rows.csv
```"""
    return written(body, config.base, config.acts_from, tags=["t-few"])


def _head(task: AnyTask, results: Mapping[str, Any], config: IA3Config) -> str:
    kind = "A text classifier" if isinstance(task, Task) else "Generates text"
    size = ""
    if "trainable_parameters" in results and "adapter_bytes" in results:
        size = f" {results['trainable_parameters']:,} numbers, {results['adapter_bytes'] / 1000:.0f} kB."
    peft = ""
    if config.acts_from == "question":
        peft = " It acts from the question on, behind the text that the base model reads as it is; PEFT does not load such an adapter."
    return (
        f"# {task.name}\n\n{(task.description or kind).rstrip('.')}: an (IA)³ adapter ([arXiv:2205.05638]({PAPER})) for "
        f"`{shown_base(config.base)}`.{size}{peft}"
    )


def _labels(task: AnyTask, results: Mapping[str, Any]) -> str:
    if not isinstance(task, Task):
        return ""
    if task.labels is None:
        return "## Labels\n\nThe answers are in each row, and a label is the place of one, from 0."
    counts = results.get(TRAIN_LABELS, {})
    rows = [f"| {_cell(label)} | {counts.get(label, 0) if counts else ''} |" for label in task.labels]
    several = "A row has any number of these labels.\n\n" if task.multi_label else ""
    return f"## Labels\n\n{several}| label | training rows |\n|---|---:|\n" + "\n".join(rows)


def _wordings(task: AnyTask) -> str:
    return "## The prompt\n\n" + "\n\n".join(_wording(task, template) for template in task.templates)


def _wording(task: AnyTask, template: Template) -> str:
    """A template and its answers."""
    if not isinstance(task, Task):
        chat = " (a user's message in the tokenizer's chat template)" if task.chat else ""
        answer = task.answer or f"JSON of {', '.join(task.answer_columns)}"
        return f"{_fenced(template.prompt.rstrip())}\n\nThe answer{chat}: `{answer}`"
    own = task.choices if template.choices is None else template.choices
    answers = [f"- `{label}`: {text}" for label, text in own.items()] if isinstance(own, dict) else [f"- `{own}`"]
    return f"{_fenced(template.prompt.rstrip())}\n\nLabels and their answers:\n\n" + "\n".join(answers)


def _training(recipe: Recipe, results: Mapping[str, Any], where: str) -> str:
    how = []
    if "steps" in results:
        how += [f"{results['steps']} steps"]
    if "train_seconds" in results:
        how += [f"{results['train_seconds']:.0f} s"]
    if "seed" in results:
        how += [f"seed {results['seed']}"]
    if "learning_rate" in results:
        how += [f"learning rate {results['learning_rate']}"]
    if recipe.init is not None:
        how += [f"starting from `{shown_base(recipe.init)}`"]
    if "trained_at_once" in results:
        how += [f"{results['trained_at_once']} adapters at once"]
    rows = f" on {results['train_examples']} labelled rows" if "train_examples" in results else ""
    by = f"Made by `{results['command']}` with " if "command" in results else ""
    text = f"{by}T-Few's recipe ({recipe.name}){rows}" + (f": {', '.join(how)}." if how else ".")
    weights = results.get("opinions", {}).get("weights")
    if weights:
        counted = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        text += f" What answers, with its weight: {counted}."
    shown = "No file here shows those rows."
    if where == HERE:
        shown = "Of this folder's files only `report.html`, if it is there, shows those rows; `ia3 push` leaves it out."
    return (
        f"## Training\n\n{text}\n\n{shown} `metrics.json` has a hash of each, by which `ia3 evaluate` knows "
        f"rows that were trained on."
    )


def _results(results: Mapping[str, Any]) -> str:
    parts = []
    if "trained" in results:
        titles = titles_of(results["trained"])
        lines = [f"| {results['test_rows']} test rows | {' | '.join(titles.values())} |"]
        lines += ["|---" + "|---:" * len(titles) + "|"]
        lines += [
            f"| {name} | {' | '.join(shown_metric(results[key][metric]) for metric in titles)} |"
            for key, name in METHODS.items()
            if key in results
        ]
        medians = " Each number is the median over the prompts above." if "templates" in results else ""
        parts += [f"Measured on labelled test rows, which training did not use.{medians}", "\n".join(lines)]
    if "cross_validation" in results:
        scores = results["cross_validation"]
        each = ", ".join(f"{title} {shown_metric(scores[name])}" for name, title in titles_of(scores).items())
        parts += [f"Cross-validation on the training rows: {each}."]
    if "calibration" in results:
        its = results["calibration"]
        parts += [
            f"The probabilities are calibrated on {its['rows']} held-out training rows: expected calibration error "
            f"{its['calibration_error']:.3f}, log loss {its['log_loss']:.3f}."
        ]
    return "## Results\n\n" + "\n\n".join(parts or ["Nothing was measured."])


def _limits(task: AnyTask, results: Mapping[str, Any]) -> str:
    columns = ", ".join(f"`{column}`" for column in task.columns)
    lines = [
        f"- For texts like those that it was trained on, in the column{'s' if len(task.columns) > 1 else ''} {columns}. "
        "For others, measure first: `ia3 evaluate` on some labelled rows.",
    ]
    if not isinstance(task, Task):
        lines += ["- What it writes can be wrong or made up, in fluent words; check it before it is used."]
    elif task.multi_label:
        lines += ["- It knows no labels but those above; a text of another kind may get one of them nonetheless."]
    else:
        lines += [
            "- Each text gets one of the labels, also one that fits none of them; `--abstain-below` leaves doubtful ones open."
        ]
    if isinstance(task, Task) and "calibration" not in results:
        lines += ["- The probabilities are not calibrated."]
    few = results.get("train_examples")
    if few:
        lines += [f"- It has learned from {few} rows: what is rare in them, it does not know well."]
    if isinstance(task, Task) and results.get("test_rows"):
        rows = results["test_rows"]
        lines += [f"- An accuracy measured on {rows} rows can be off by {98 / rows**0.5:.0f} points either way (95%)."]
    lines += ["- What is known of the base model's biases and limits holds here too."]
    return "## Intended use and limits\n\n" + "\n".join(lines)


def _use(task: AnyTask, config: IA3Config, where: str) -> str:
    there = "In this folder, with" if where == HERE else "With"
    base = ""
    if config.base and hub_id(config.base) is None:
        base = f"\n\nThe base model was the folder or file `{shown_base(config.base)}`; say where yours is: `--model`."
    row = _row(task)
    if len(task.columns) == 1:
        command = f'ia3 predict {where} "{_TEXT}"'
    else:
        command = f"echo {shlex.quote(json.dumps(row))} > rows.jsonl\nia3 predict {where} --data rows.jsonl"
    rows = f'["{_TEXT}"]' if len(row) == 1 else f"[{row}]"
    if isinstance(task, Task) and task.labels is not None:
        python = f"""from ia3 import FewShotClassifier

classifier = FewShotClassifier.load("{where}")
rows = {rows}
print(classifier.predict(rows), classifier.predict_proba(rows), classifier.classes_)"""
    else:
        call = "generate(model, tokenizer, folder.any_task, rows)"
        if isinstance(task, Task):
            call = "predict(model, tokenizer, folder.task, rows, temperature=folder.temperature, recipe=folder.recipe)"
        python = f"""from ia3 import AdapterFolder, IA3Model, {call.partition("(")[0]}, load_base

folder = AdapterFolder("{where}")
base, tokenizer = load_base(folder.config.base)
model = IA3Model.from_pretrained(base, folder)
rows = {rows}
print({call})"""
    return f"## Use\n\n{there} the package `ia3`:\n\n```sh\n{command}\n```\n\n```python\n{python}\n```{base}"


def _row(task: AnyTask) -> dict[str, Any]:
    """A row that a task can use, without its label."""
    row: dict[str, Any] = dict.fromkeys(task.columns, _TEXT)
    if isinstance(task, Task) and task.labels is None:  # some columns hold the answers
        answers = [name for name in columns_of(task.choices_of(0)) if name not in task.templates[0].columns]
        row |= {name: f"answer {number}" for number, name in enumerate(answers)}
        row |= {answers[0]: ["one answer", "another"]} if len(answers) == 1 else {}
    return row


def _evaluations(task: AnyTask, results: Mapping[str, Any]) -> list[EvalResult]:
    """What was measured of the trained adapter, for the metadata's model-index."""
    from huggingface_hub import EvalResult

    if "trained" not in results:
        return []
    kind = "text-classification" if isinstance(task, Task) else "text-generation"
    # Its name stands for the data, which may be nowhere but on somebody's disk.
    dataset = re.sub(r"[^\w.-]+", "-", task.name).strip("-") or "task"
    return [
        EvalResult(
            task_type=kind,
            dataset_type=dataset,
            dataset_name=f"{task.name}, {results['test_rows']} test rows",
            dataset_split="test",
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=title,
            metric_value=round(results["trained"][name], 4),
        )
        for name, title in titles_of(results["trained"]).items()
    ]


def _fenced(text: str) -> str:
    """A text as a block of code, behind a fence that it does not hold."""
    longest = max((len(ticks) for ticks in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _cell(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
