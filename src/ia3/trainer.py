"""`transformers.Trainer` for adapted models: it saves adapters only, and resumes from them."""

from __future__ import annotations

import inspect
import io
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.generic import can_return_loss, find_labels

from ia3.adapter.adapted import find_adapted
from ia3.adapter.model import IA3Model


class _ForAdapters(transformers.Trainer):
    """Lets a trainer handle an `IA3Model` or `PeftModel` as the original handles PEFT's models.

    The columns and labels are the wrapped model's. Checkpoints hold adapters and the state of training, without the
    base model; resuming and loading the best model read them. Everything else, and all other models, work as in the
    original.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        base = self._wrapped()
        if base is not None:
            if self.args.label_names is None:
                self.label_names = find_labels(type(base))
            self.can_return_loss = can_return_loss(type(base))
            if not hasattr(base, "accepts_loss_kwargs"):
                parameters = inspect.signature(base.forward).parameters.values()
                self.model_accepts_loss_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def silence(self) -> None:
        """Remove the callbacks that print, because the caller shows the progress."""
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)

    def _adapted(self) -> IA3Model | None:
        found = None if self.model is None else find_adapted(self.model)
        return found if isinstance(found, IA3Model) else None

    def _wrapped(self) -> nn.Module | None:
        model = self._adapted()
        return None if model is None else model.model

    @property
    def trained_adapters(self) -> list[str]:
        """The names of adapters to read from a checkpoint."""
        model = self._adapted()
        return [] if model is None else model.active_adapters

    def _set_signature_columns_if_needed(self) -> None:
        base = self._wrapped()
        if base is None:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            names = inspect.signature(base.forward).parameters
            self._signature_columns = list(dict.fromkeys([*names, "label", "label_ids", *self.label_names]))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        folder = str(output_dir or self.args.output_dir)
        # A state that is gathered from shards has the wrapper's names. Without shards, the model has all tensors.
        model.save_pretrained(folder, is_main_process=self.args.should_save, state_dict=state_dict)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            arguments = io.BytesIO()  # torch.save has its own error for a full disk
            torch.save(self.args, arguments)
            Path(folder, TRAINING_ARGS_NAME).write_bytes(arguments.getvalue())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for name in self.trained_adapters:
            folder = resume_from_checkpoint if name == "default" else os.path.join(resume_from_checkpoint, name)
            adapted.load_adapter(folder, name, is_trainable=True)

    def _load_best_model(self) -> None:
        if self._adapted() is None or self.state.best_model_checkpoint is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class Trainer(_ForAdapters):
    """`transformers.Trainer` for adapted models, with or without PEFT installed."""


class Seq2SeqTrainer(_ForAdapters, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for adapted models, with or without PEFT installed."""


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a `Trainer` in a folder; None if there is none.

    An incomplete checkpoint, from a run that ended while writing, has no `trainer_state.json`.
    """
    found = {}
    for state in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", state.parent.name)
        if step and state.stat().st_size:
            found[int(step[1])] = str(state.parent)
    return found[max(found)] if found else None
