"""Tiny models with several adapters, batches whose rows have one each, and what each row has to get."""

from contextlib import contextmanager

import torch
from torch import nn

import ia3
from ia3 import IA3Config
from support import tiny

BASE = "__base__"
NAMES = ("one", BASE, "two", "one")
ADAPTERS = ("one", "two", "three")


def adapted(arch: str, base: nn.Module | None = None, **fields):
    """A model with adapters `one` (active), `two` and `three` of the usual modules."""
    model = tiny.adapt(arch, ia3, adapter="one", base=base, **fields)
    for seed, name in enumerate(ADAPTERS[1:], start=2):
        add(model, arch, name, seed, **fields)
    return model


def add(model, arch: str, name: str, seed: int, **fields) -> None:
    targets, feedforward = tiny.TARGETS[arch]
    fields = {"task_type": tiny.TASKS[arch], "target_modules": targets, "feedforward_modules": feedforward, **fields}
    # A façade for a task adds its head to each adapter, the model in it does not.
    (model.base_model if fields["task_type"] is None else model).add_adapter(name, IA3Config(**fields))
    tiny.randomize(model, seed, name)


@contextmanager
def under(model, name: str):
    """One adapter for all rows; what is active and trainable stays as it is."""
    active = model.ia3_routing.active
    model.ia3_routing.switch(active=() if name == BASE else (name,))
    try:
        yield
    finally:
        model.ia3_routing.switch(active=active)


def row_by_row(model, names, call) -> torch.Tensor:
    """Each row of what `call()` returns for the whole batch under that row's adapter."""
    results = {}
    for name in dict.fromkeys(names):
        with under(model, name):
            results[name] = call()
    return torch.stack([results[name][row] for row, name in enumerate(names)])


def inputs(arch: str, rows: int = len(NAMES), length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of `tiny.batch`, all but labels; the length is a multiple of the rows."""
    batch = tiny.batch(arch, rows, length, seed)
    labels = batch.pop("labels")
    return {**batch, "decoder_input_ids": labels} if arch in ("t5", "bart") else batch
