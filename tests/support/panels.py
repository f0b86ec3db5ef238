"""A tiny model with adapters of both kinds in folders, for the lm-evaluation-harness."""

from pathlib import Path

import torch

from ia3 import IA3Config, IA3Model, load_base
from support import words

KINDS = {"one": "start", "two": "start", "asks": "question"}
"""An adapter's name → from where it acts."""


def save(folder: Path) -> None:
    """Write `model`, and an adapter of each of `KINDS` below `adapters`."""
    words.save_model(folder / "model")
    for number, (name, acts_from) in enumerate(KINDS.items()):
        base, _ = load_base(str(folder / "model"))
        targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from=acts_from, **targets))
        generator = torch.Generator().manual_seed(number)
        for parameter in model.adapter_parameters("default"):
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "adapters" / name)
