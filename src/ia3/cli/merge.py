"""`ia3 merge`: a plain transformers model with the adapter multiplied into its weights."""

from __future__ import annotations

from pathlib import Path

import typer

from ia3.adapter.stored import TASK_NAME
from ia3.answering import load_adapted
from ia3.cli.common import AdapterArgument, JsonOption, ModelOption, console, print_json, require_new_folder
from ia3.files import new_folder
from ia3.folder import AdapterFolder


def merge(
    adapter: str = AdapterArgument,
    output: Path = typer.Option(
        ..., "--output", "-o", help="Folder of the merged model; must not exist yet, or be empty."
    ),
    model: str | None = ModelOption,
    json_output: bool = JsonOption,
) -> None:
    """Merge an adapter into its base model, and save a plain transformers model with its tokenizer."""
    out = console(json_output)
    require_new_folder(output)
    from ia3.opinions.opinions import Opinions

    folder = AdapterFolder(adapter)
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(folder, model, "stored")
    with out.status("Merging …"):
        merged = adapted.merge_and_unload(safe_merge=True)
        with new_folder(output) as temporary:
            merged.save_pretrained(temporary)  # type: ignore[operator]
            tokenizer.save_pretrained(temporary)
            if folder.task is not None:
                folder.task.save(temporary / TASK_NAME)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json_output:
        print_json({"output": str(output), "bytes": size, "model_class": type(merged).__name__})
    else:
        out.print(f"{type(merged).__name__} saved in {output} ({size / 1e6:.0f} MB).", markup=False)
        if folder.opinions.model_dump() != Opinions().model_dump():
            out.print(
                "The adapter's opinions (heads, balance, prior) are not in it, so its answers differ; train with --opinions "
                "vectors for the same ones.",
                style="yellow",
                soft_wrap=True,
            )
