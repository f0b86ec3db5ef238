"""The harness's tasks for many adapters of one base model: `evaluate_each`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ia3.harness import missing


def evaluate_each(
    pretrained: str,
    adapters: str | Sequence[str],
    tasks: Sequence[Any],
    question: str | None = None,
    dtype: str = "stored",
    device: str | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Run the harness's tasks for many adapters: name → what `lm_eval.simple_evaluate` returns for it.

    >>> found = evaluate_each("smollm2", "__base__|adapters/tickets|adapters/urgency", ["copa", "boolq"], limit=40)
    >>> found["adapters/tickets"]["results"]["copa"]["acc,none"]

    The base model is loaded once, and all adapters answer a request together; see `Panel`.

    Args:
        pretrained, adapters, question, dtype, device: see `ia3.harness.model.IA3LM`.
        tasks: as of `simple_evaluate`.
        **options: its other arguments, such as `num_fewshot`, `limit` and `task_manager`.

    Raises:
        InputError: `lm_eval` is not installed; see also `IA3LM`.
    """
    simple_evaluate: Any  # the harness's decorators hide its type
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing() from error
    from ia3.harness.model import sharing_panels
    from ia3.harness.panel import names_of

    if options.get("task_manager") is None:
        metadata = {"pretrained": pretrained, **(options.get("metadata") or {})}
        options["task_manager"] = TaskManager(metadata=metadata)  # once, for it takes seconds to find all tasks
    names = [*names_of(adapters)]
    cache = options.pop("use_cache", None)
    found = {}
    with sharing_panels():
        for name in names:
            arguments = {"pretrained": pretrained, "adapter": name, "adapters": "|".join(names), "dtype": dtype}
            arguments |= {} if question is None else {"question": question}
            its = {} if cache is None else {"use_cache": own(cache, name)}
            found[name] = simple_evaluate(
                model="ia3", model_args=arguments, tasks=list(tasks), device=device, **its, **options
            )
    return found


def own(path: str, name: str) -> str:
    """An adapter's own path beside those of others: the harness's cache does not know which model has answered."""
    return f"{path}_{name.strip('./').replace('/', '_')}"
