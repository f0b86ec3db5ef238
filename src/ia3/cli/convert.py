"""`ia3 convert`: convert another library's (IA)³ checkpoint to an adapter folder."""

from __future__ import annotations

from pathlib import Path

import typer

from ia3.cli.common import JsonOption, console, print_json


def convert(
    source: str = typer.Argument(
        help="T-Few's .pt file, or the folder (or hub id) of an AdapterHub adapter or of PEFT's .bin.",
        show_default=False,
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the adapter; must not exist yet, or be empty."),
    base: str | None = typer.Option(
        None, help="Base model to record, such as bigscience/T0_3B. \\[default: the source's own]", show_default=False
    ),
    json_output: bool = JsonOption,
) -> None:
    """Convert an (IA)³ checkpoint of T-Few's authors, AdapterHub or PEFT's .bin to an adapter folder."""
    out = console(json_output)
    with out.status("Converting …"):
        from ia3.adapter import convert as conversion

        converted = conversion.convert(source, output, base)
    config = converted.config.to_dict()
    numbers = sum(tensor.numel() for tensor in converted.tensors.values())
    size = sum(file.stat().st_size for file in output.iterdir())
    if json_output:
        print_json(
            {
                "output": str(output),
                "source": converted.source,
                "base_model": config["base_model_name_or_path"],
                "target_modules": config["target_modules"],
                "feedforward_modules": config["feedforward_modules"],
                "parameters": numbers,
                "bytes": size,
                "notes": converted.notes,
            }
        )
        return
    for note in converted.notes:
        out.print(note, markup=False)
    if not config["base_model_name_or_path"]:
        out.print("The source names no base model; commands that need it take --model.", markup=False)
    out.print(
        f"{converted.source} adapter of {numbers:,} numbers in {len(converted.tensors)} tensors saved in {output} "
        f"({size / 1000:.0f} kB).",
        markup=False,
    )
