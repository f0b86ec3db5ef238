"""A trainer of the toy task on a tiny model."""

import torch

from ia3 import IA3Config, IA3Model, Member, Recipe, Task, TFewTrainer
from support import tiny, words

TASK = Task(template=words.TEMPLATE, choices=words.CHOICES)


def trainer(folder, steps=12, rows=None, seed=0, eval_rows=None, **kwargs):
    """Of a tiny Llama, which learns the toy task in a few steps; `args` change what the recipe says."""
    torch.manual_seed(0)
    model = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    options = {"seed": seed, "save_strategy": "no", "disable_tqdm": True, **kwargs.pop("args", {})}
    arguments = Recipe(steps=steps).training_arguments(folder, **options)
    member = Member(TASK, words.rows(32) if rows is None else rows, eval_rows=eval_rows)
    return TFewTrainer(model, arguments, words.tokenizer(), member, **kwargs)
