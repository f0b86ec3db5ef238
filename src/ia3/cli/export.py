"""`ia3 export`: an adapter, its base model and its task as an ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from ia3.cli.common import AdapterArgument, JsonOption, ModelOption, console, print_json, require_new_folder
from ia3.folder import AdapterFolder


def export(
    adapter: str = AdapterArgument,
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the export; must not exist yet, or be empty."),
    model: str | None = ModelOption,
    json_output: bool = JsonOption,
) -> None:
    """Write an adapter with its base model and its task as an ONNX file, which labels texts without this package.

    The folder has model.onnx, tokenizer.json, the task as answer.json, and answer.py, which needs onnxruntime, tokenizers and
    NumPy: python FOLDER/answer.py "some text". Its vectors have to answer alone: ia3 train --opinions vectors
    """
    out = console(json_output)
    require_new_folder(output)
    from ia3.onnx.export import export as write

    with out.status("Exporting …"):
        done = write(AdapterFolder(adapter), output, model)
    if json_output:
        print_json({"output": str(output), **dataclasses.asdict(done)})
    else:
        out.print(
            f"Saved in {output} ({done.bytes / 1e6:.0f} MB). On {done.rows} rows its probabilities differ from the adapter's by "
            f'{done.difference:.1g} at most. Try it: python {output}/answer.py "some text"',
            markup=False,
            soft_wrap=True,
        )
