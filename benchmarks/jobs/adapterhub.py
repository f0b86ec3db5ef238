"""The jobs by AdapterHub's `adapters`, in an environment of its own: padded rows, full logits, BatchSplit for mixed batches."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from adapters.composition import BatchSplit  # type: ignore[import-not-found]
from torch import nn

from .peers import Column, vector


def _config() -> Any:
    return adapters.IA3Config(intermediate_lora=False, output_lora=True)


class AdapterHub(Column):
    """Its (IA)³, by what it calls `output`: in a Llama that scales up_proj's output, and so down_proj's input, as ours.

    Its usual `intermediate` scales down_proj's output there.
    """

    def load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        # transformers 4 knows the file, but not the class that transformers 5 names beside it.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(self.folder, "tokenizer.json")))
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval().requires_grad_(False), tokenizer

    def adapt(self, model: nn.Module) -> Any:
        if not hasattr(model, "adapters_config"):
            adapters.init(model)  # type: ignore[arg-type]
        model.add_adapter("default", config=_config())  # type: ignore[operator]
        model.train_adapter("default")  # type: ignore[operator]
        return model

    def release(self, model: Any) -> None:
        model.delete_adapter("default")
        gc.collect()

    @torch.no_grad()
    def randomized(self, model: Any, number: int = 0, name: str = "default") -> Any:
        for key, module in model.named_modules():
            if name in getattr(module, "loras", {}):
                scale = module.loras[name].lora_B
                module_name = key.replace("up_proj", "down_proj")
                scale.copy_(vector(module_name, scale.numel(), number).view_as(scale))
        return model

    def hold(self, model: Any, count: int) -> None:
        for number in range(count):
            if f"n{number}" not in model.adapters_config:
                model.add_adapter(f"n{number}", config=_config())
                self.randomized(model, number, f"n{number}")

    def mixed_logits(self, model: Any, ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        model.set_active_adapters(BatchSplit(*names, batch_sizes=[1] * len(names)))
        return self.last_logits(model, ids)

    def save(self, model: Any, folder: Path) -> None:
        model.save_adapter(str(folder), "default")

    def load_one(self, model: Any, folder: Path, name: str) -> None:
        model.load_adapter(str(folder), load_as=name)

    def switch(self, model: Any, name: str) -> None:
        model.set_active_adapters(name)
