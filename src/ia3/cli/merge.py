"""`ia3 merge`: a plain transformers model with the adapter multiplied into its weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import typer

from ia3.cli.common import TASK_NAME, AdapterArgument, JsonOption, ModelOption, console, load_adapted, print_json
from ia3.errors import InputError


def merge(
    adapter: str = AdapterArgument,
    output: Path = typer.Option(
        ..., "--output", "-o", help="Folder of the merged model; must not exist yet, or be empty."
    ),
    model: str | None = ModelOption,
    json_output: bool = JsonOption,
) -> None:
    """Multiply an adapter into its base model and save that: a plain transformers model, with tokenizer."""
    out = console(json_output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"Expected --output to be a new or empty folder, found {str(output)!r}; choose another.")
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(adapter, model)
    with out.status("Merging …"):
        merged = adapted.merge_and_unload(safe_merge=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            merged.save_pretrained(temporary)  # type: ignore[operator]
            tokenizer.save_pretrained(temporary)
            if Path(adapter, TASK_NAME).is_file():
                shutil.copy(Path(adapter, TASK_NAME), temporary)
            temporary.chmod(0o755)
            if output.exists():
                output.rmdir()
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json_output:
        print_json({"output": str(output), "bytes": size, "model_class": type(merged).__name__})
    else:
        out.print(f"{type(merged).__name__} saved in {output} ({size / 1e6:.0f} MB).", markup=False)
