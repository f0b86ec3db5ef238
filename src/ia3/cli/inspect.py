"""`ia3 inspect`: what an adapter rescales, and by how much. Reads only the adapter and loads no base model."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import typer

from ia3.cli.common import AdapterArgument, JsonOption, console, print_json, table
from ia3.errors import InputError, brief
from ia3.folder import AdapterFolder


def inspect(
    adapter: str = AdapterArgument,
    top: int = typer.Option(5, min=0, help="Number of the largest and smallest scalings to list."),
    json_output: bool = JsonOption,
) -> None:
    """Show what an adapter rescales: modules, sizes, and the largest and smallest scalings by layer and kind."""
    config = AdapterFolder(adapter).config  # before torch is imported, what cannot be used
    import torch

    from ia3.adapter.tensors import PREFIX, check_vector, wrong_values

    folder, tensors, _ = AdapterFolder.whole(adapter)
    config = folder.config
    vectors, sides = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(".ia3_l"):
            check_vector(name, tensor)
            path = name.removeprefix(PREFIX).removesuffix(".ia3_l")
            vectors[path], sides[path] = tensor.flatten(), "input" if tensor.shape[0] == 1 else "output"
    problem = wrong_values(vectors, dict.fromkeys(vectors, torch.float32))
    if problem:
        raise InputError(f"Expected finite floating-point vectors in {brief(adapter)}, found {problem}.")
    vectors = {path: vector.float() for path, vector in vectors.items()}
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in vectors:
        kinds[re.sub(r"\.\d+\.", ".*.", path)].append(path)
    rows: list[dict[str, Any]] = []
    for kind, paths in kinds.items():
        values = [vectors[path] for path in paths]
        rows.append(
            {
                "kind": kind,
                "side": "/".join(sorted({sides[path] for path in paths})),
                "modules": len(paths),
                "numbers": sum(value.numel() for value in values),
                "min": min(float(value.min()) for value in values),
                "max": max(float(value.max()) for value in values),
                "mean_change": float(sum((value - 1).abs().sum() for value in values) / sum(v.numel() for v in values)),
            }
        )
    scalings = sorted(
        (
            {"module": path, "index": i, "scale": float(scale)}
            for path, v in vectors.items()
            for i, scale in enumerate(v)
        ),
        key=lambda item: item["scale"],
    )
    other = {name: list(tensor.shape) for name, tensor in tensors.items() if not name.endswith(".ia3_l")}
    result = {
        "base_model": config.base_model_name_or_path,
        "target_modules": config.to_dict()["target_modules"],
        "feedforward_modules": config.to_dict()["feedforward_modules"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "kinds": rows,
        "smallest": scalings[:top],
        "largest": scalings[::-1][:top],
        "modules_to_save": other,
        "layers": {path: {"min": float(v.min()), "max": float(v.max())} for path, v in vectors.items()},
    }
    if json_output:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.markup import escape

    out = console()
    out.print(
        f"(IA)³ adapter for {result['base_model'] or 'an unnamed model'}: {result['parameters']:,} numbers, "
        f"{result['bytes'] / 1000:.0f} kB",
        markup=False,
    )
    names = ("module", "side", "modules", "numbers", "smallest", "largest", "mean |l - 1|")
    kinds = table(*names, left=2, title="What it rescales (1 is no change)")
    for row in result["kinds"]:
        kinds.add_row(
            escape(row["kind"]),
            row["side"],
            str(row["modules"]),
            f"{row['numbers']:,}",
            f"{row['min']:.3f}",
            f"{row['max']:.3f}",
            f"{row['mean_change']:.4f}",
        )
    out.print(kinds)
    if result["largest"]:
        extremes = table("module", "index", "scale", title="Largest and smallest scalings")
        for item in [*result["largest"], *result["smallest"][::-1]]:
            extremes.add_row(escape(item["module"]), str(item["index"]), f"{item['scale']:.4f}")
        out.print(extremes)
    for name, shape in result["modules_to_save"].items():
        out.print(f"trained in full: {name} {tuple(shape)}", markup=False)
