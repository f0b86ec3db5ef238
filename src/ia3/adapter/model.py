"""Put adapters into a model, switch, compose, merge, take them out: `IA3Model`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.modules.module import _IncompatibleKeys

from ia3.adapter import checkpoint
from ia3.adapter.adapted import Adapted
from ia3.adapter.card import update_model_card, write_model_card
from ia3.adapter.config import IA3Config
from ia3.adapter.merging import check_finite, merge_for_good, sync_weights, unload
from ia3.adapter.mixing import check_generation, check_media
from ia3.adapter.routing import SameRows
from ia3.adapter.rows import BASE, Rows, Starts, row_count, row_shape, uncompiled
from ia3.adapter.targets import has_encoder
from ia3.adapter.wrapping import check_copies
from ia3.errors import InputError, brief, shown, similar
from ia3.files import hub_arguments, upload


class IA3Model(Adapted):
    """A pretrained model with (IA)³ adapters in it (arXiv:2205.05638).

    The model is adapted in place: its keys', values' and feed-forwards' projections become `IA3Layer`s, everything
    else is frozen. Whatever `IA3Model` does not define (`config`, `device`, `layers`, …) is the wrapped model's.
    `get_peft_model` puts the façade of PEFT's scripts around it, `PeftModel`.

    Args:
        model: the base model.
        config: the first adapter's config, or several by name, or an empty dictionary (for a model whose adapters are
            all in a bank, or added later). `IA3Model(config, model)`, the order of PEFT's
            documentation, works too.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: create vectors without memory, to be filled by a checkpoint.
        autocast_adapter_dtype: float32 vectors; False: of their layers' dtype.

    Attributes:
        model: the base model, with adapters in it.
        peft_config: adapter name → `IA3Config`.
        adapter_folders: adapter name → what belongs beside it in a folder (task, recipe, …), where that is known.

    Raises:
        InputError: the config fits no module of the model; see `resolve`.
    """

    # Merging and taking out.

    def _ia3_names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self.require_adapters(names)
        waiting = [name for name in names if self.peft_config[name].acts_from == "question"]
        if waiting:
            why = "merged weights would act on the text too, which is another function"
            if has_encoder(self.model):
                why = "such adapters stay beside the weights, in encoder-decoders as in decoders"
            raise InputError(
                f"Expected adapters that act from the start of a text, found {shown(waiting)}, which acts from the question "
                f"on: {why}. Leave it apart."
            )
        return names

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Multiply adapters into the base weights in place. While any are merged, exactly they are in effect.

        Args:
            adapter_names: which; None: the active ones.
            safe_merge: first make sure that no merged weight is NaN or infinite.

        Raises:
            InputError: an unknown name, several that train the same module in full, or (`safe_merge`) a broken adapter;
                the model stays as it was.
        """
        names = self._ia3_names_to_merge(adapter_names)
        new = [name for name in names if name not in self.ia3_routing.merged]
        if not new:
            if names:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        merged = (*self.ia3_routing.merged, *new)
        check_copies(self.model, self.ia3_routing, merged)
        if safe_merge:
            check_finite(self.model, self.ia3_routing, merged)
        self.ia3_routing.switch(merged=merged)
        sync_weights(self.ia3_routing)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit as they were before merging."""
        if not self.ia3_routing.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.ia3_routing.switch(merged=())
        sync_weights(self.ia3_routing)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model, without adapters, with vectors multiplied into its weights and biases.

        Args:
            progressbar: show one.
            safe_merge: first make sure that no merged weight is NaN or infinite; if one is, the model stays as it was.
            adapter_names: which adapters; None: the active ones.

        Raises:
            InputError: as of `merge_adapter`.
        """
        names = list(dict.fromkeys([*self.ia3_routing.merged, *self._ia3_names_to_merge(adapter_names)]))
        check_copies(self.model, self.ia3_routing, names)
        if safe_merge:
            check_finite(self.model, self.ia3_routing, names)
        merge_for_good(self.model, self.ia3_routing, names, progressbar)
        return self._ia3_emptied()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        unload(self.model, self.ia3_routing)
        return self._ia3_emptied()

    def _ia3_emptied(self) -> nn.Module:
        self.peft_config.clear()
        self.adapter_folders.clear()
        self.ia3_routing.from_question.clear()
        self._ia3_trainable.clear()
        self.ia3_routing.attach(None, {})
        self.ia3_routing.switch(active=(), merged=())
        return self.model

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trainable, and how many there are."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Saving and loading.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | str | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Callable | None = None,
    ) -> None:
        """Write adapters, and only they, in PEFT's format. One that is not named "default" gets a subfolder.

        Args:
            save_directory: a folder; made when it is not there.
            safe_serialization: safetensors; False: `torch.save`.
            selected_adapters: which; None: all.
            save_embedding_layers: see `get_peft_model_state_dict`.
            is_main_process: False writes nothing (in distributed training only one process writes).
            state_dict: the model's state, when it has been gathered already.
            save_function: accelerate's, which scripts give; ignored, with a warning: a folder is written as a whole.

        Raises:
            InputError: an unknown name, or the path is a file.
        """
        if save_function is not None:
            warnings.warn("'save_function' is ignored: an adapter's folder is written as a whole.", stacklevel=2)
        if os.path.isfile(save_directory):
            raise InputError(f"Provided path ({save_directory}) should be a directory, not a file.")
        chosen = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
        names = list(self.peft_config if chosen is None else chosen)
        self.require_adapters(names)
        if not names:
            raise InputError("Expected an adapter to save, found none in the model.")
        if not is_main_process:
            return
        for name in names:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name, safe_serialization, state_dict, save_embedding_layers)
        write_model_card(self, save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write a `README.md` that says what the adapter is, or complete the head of the folder's own."""
        update_model_card(self, output_dir)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload the adapters to a hub repository, which is made when it is not there. Returns the commit's address.

        Args:
            repo_id: owner/name.
            private: for a new repository.
            token: of the hub; None: the one that is logged in.
            **kwargs: `commit_message`, `revision`, `create_pr`, … as of `huggingface_hub.upload_folder`.
        """
        kwargs.setdefault("commit_message", "Upload (IA)³ adapter")
        return upload(self.save_pretrained, repo_id, private, token, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> IA3Model:
        """Put a saved adapter into a base model.

        Args:
            model: the base model; adapted in place.
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name in this model.
            is_trainable: go on training it; else it is frozen and the model is put into evaluation mode.
            config: use this one, not the saved one.
            autocast_adapter_dtype: see `load_adapter`.
            ephemeral_gpu_offload: see `load_adapter`.
            low_cpu_mem_usage: see `load_adapter`.
            key_mapping: see `load_adapter`.
            **kwargs: see `load_adapter`.

        Raises:
            InputError: no adapter there, another method's, damaged, or for another model; the model stays as it was.
        """
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)
        with adapted._ia3_wrapping(model):
            checkpoint.load_adapter(
                adapted,
                model_id,
                adapter_name,
                is_trainable,
                config,
                low_cpu_mem_usage,
                autocast_adapter_dtype,
                key_mapping,
                **_loading_arguments(ephemeral_gpu_offload, kwargs),
            )
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter beside the others, not active; or refill the one of that name.

        Args:
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name in this model.
            is_trainable: make it trainable; else the model is put into evaluation mode.
            torch_device: ignored, with a warning: vectors lie where their layers do.
            autocast_adapter_dtype: float32 vectors; False: of their layers' dtype.
            ephemeral_gpu_offload: for LoRA; True is an error.
            low_cpu_mem_usage: create vectors without memory before they are filled.
            key_mapping: as of `load_peft_weights`.
            **kwargs: `ignore_mismatched_sizes` as of `set_peft_model_state_dict`, `subfolder`, and the hub's
                `revision`, `token`, `cache_dir`, ….

        Returns:
            `missing_keys` and `unexpected_keys`, which are empty: an adapter that does not fit is an error.

        Raises:
            InputError: see `from_pretrained`.
        """
        known = adapter_name in self.peft_config
        where = _loading_arguments(ephemeral_gpu_offload, {"torch_device": torch_device, **kwargs})
        result = checkpoint.load_adapter(
            self,
            model_id,
            adapter_name,
            is_trainable,
            None,
            low_cpu_mem_usage,
            autocast_adapter_dtype,
            key_mapping,
            **where,
        )
        if not known and is_trainable:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()
        return result

    # Being the wrapped model.

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        acts_from: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's forward pass.

        Args:
            *args: the wrapped model's.
            adapter_names: an adapter for each row of the batch, "__base__" for none; None: the active adapters for all.
            acts_from: for each row the place (from 0, padding counts) where its question begins, from which adapters with
                `acts_from="question"` act. None: everywhere, which is right where all places are behind a text that was
                read before (`past_key_values`), and else an error for such adapters. An encoder-decoder takes none: there
                they act in the decoder.
            **kwargs: the wrapped model's.

        Raises:
            InputError: `adapter_names` is not a name a row, a name is unknown, adapters are merged, or the model mixes
                rows in a way that does not allow it; `acts_from` is missing, or is no place for each row, or the model is
                an encoder-decoder.
        """
        if adapter_names is None and acts_from is None and not self._ia3_passing:
            return self.model(*args, **kwargs)
        rows, starts = self._ia3_places(adapter_names, acts_from, args, kwargs)
        with self.ia3_routing.passing(rows, starts):
            return self.model(*args, **kwargs)

    # Compiled code begins inside, where names have become tensors. (torch.compiler.disable(recursive=False) does this and
    # more: it refuses torch.export, and a compiled module with this one in it.)
    skip_code(forward.__code__)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        acts_from: Sequence[int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's generation. Args and errors: see `forward`."""
        check_generation(self, adapter_names or (), kwargs)
        generate: Callable = self.model.generate  # type: ignore[assignment]
        rows, starts = self._ia3_places(adapter_names, acts_from, args, kwargs)
        with self.ia3_routing.passing(rows, starts), ExitStack() as stack:
            if starts is not None:  # what is generated stands behind the question's beginning
                stack.callback(self.model.register_forward_hook(self.ia3_routing.act_everywhere).remove)
            return generate(*args, **kwargs)

    @contextmanager
    def adapter_rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within `with`, parts of the model that are called by themselves have an adapter for each row, as `forward`."""
        with self.ia3_routing.passing(self._ia3_rows(adapter_names, (), {}), None):
            yield

    @property
    def _ia3_passing(self) -> bool:
        """Whether a pass has to say more than the active adapters do, or stands within one that does."""
        routing = self.ia3_routing
        return routing.rows is not None or routing.starts is not None or routing.waits

    def waits_for_question(self, adapter_names: Sequence[str] | None = None) -> bool:
        """Whether one of these adapters, or of the active ones, acts from the question on alone (`IA3Config.acts_from`)."""
        routing = self.ia3_routing
        if not routing.enabled or routing.merged:
            return False
        names = routing.active if adapter_names is None else adapter_names
        return any(self._ia3_acts_from(name) == "question" for name in dict.fromkeys(names))

    def _ia3_acts_from(self, name: str) -> str | None:
        """As of `IA3Config`; None for no adapter's name."""
        if name in self.peft_config:
            return self.peft_config[name].acts_from
        bank = self.ia3_routing.bank
        return None if bank is None or name == BASE else bank.acts_from(name)

    @uncompiled
    def _ia3_places(
        self,
        names: Sequence[str] | None,
        acts_from: Sequence[int] | torch.Tensor | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> tuple[Rows | None, Starts | None]:
        """Which adapter acts on which row of the batch that these arguments hold, and from which place of it on."""
        rows = self._ia3_rows(names, args, kwargs)
        if has_encoder(self.model):
            if acts_from is not None:
                raise InputError(
                    f"Expected no acts_from for an encoder-decoder, found {brief(acts_from)}: adapters that act from the "
                    f"question on act in its decoder. Leave it out."
                )
            return rows, None
        if not self.waits_for_question(names):
            return rows, None
        if acts_from is None:
            past = kwargs.get("past_key_values")
            if past is not None and past.get_seq_length():
                return rows, None
            raise InputError(
                "Expected acts_from, the place in each row where its question begins, for an adapter that acts from the "
                "question on; give one number a row, 0 for the whole row."
            )
        starts, shape = torch.as_tensor(acts_from), row_shape(args, kwargs)
        if shape is None or starts.shape != shape[:1] or starts.is_floating_point() or (starts < 0).any():
            count = "each row of token ids" if shape is None else f"each of {shape[0]} rows"
            raise InputError(
                f"Expected acts_from as a whole number of 0 or more for {count}, found {brief(acts_from)}."
            )
        of_rows = self.active_adapters[:1] * len(starts) if names is None else names
        waiting = torch.tensor([self._ia3_acts_from(name) == "question" for name in of_rows], device=starts.device)
        self._ia3_keep_rows()
        return rows, Starts(starts * waiting, shape[1])

    @uncompiled
    def _ia3_rows(self, names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rows | None:
        """Which adapter acts on which row of the batch that these arguments hold; None: the active ones on all."""
        if names is None:
            return None
        self.check_adapter_names(names)
        rows = row_count(args, kwargs)
        if not names or len(names) != (rows or len(names)):
            batch = "the rows" if rows is None else f"the {rows} rows"
            raise InputError(f"Expected adapter_names for {batch} of the batch, found {len(names)}.")
        if not self.ia3_routing.enabled:
            return None
        check_media(self, names, args, kwargs)
        self._ia3_keep_rows()
        return self.ia3_routing.gather(names, self.peft_config)

    def _ia3_keep_rows(self) -> None:
        """Let layers that are computed again in the backward pass have the rows of the forward pass."""
        if torch.is_grad_enabled() and self.model.training:
            for module in self.model.modules():
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not isinstance(function, SameRows):
                    module.__dict__["_gradient_checkpointing_func"] = SameRows(function, self.ia3_routing)

    def check_adapter_names(self, names: Sequence[str]) -> None:
        """Raise `InputError` unless a batch can have these adapters, one for each row."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"Expected adapter_names as a list of a name for each row, found {names!r}.")
        if self.ia3_routing.merged:
            raise InputError(
                f"Adapters are merged into the weights ({shown(self.ia3_routing.merged)}), so that all rows have them; call "
                f"unmerge_adapter() first."
            )
        bank = self.ia3_routing.bank
        for row, name in enumerate(names):
            if name not in self.peft_config and name != BASE and (bank is None or name not in bank):
                own = self.peft_config
                close = similar(name, own) if bank is None else bank.close_to(name, *own)
                raise InputError(f"Row {row}: adapter {name!r} does not exist; {close}.")

    def get_base_model(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dictionary; one that says `model_type` "custom" when it has none."""
        config = getattr(model, "config", None)
        return config.to_dict() if hasattr(config, "to_dict") else dict(config or {"model_type": "custom"})  # type: ignore[union-attr]

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that adapters rescale."""
        return list(self.ia3_layers)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """None: (IA)³ rescales modules."""
        return []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: an adapter that multiplies is no sum of the weight and a product of low rank."""
        self.require_adapters([adapter_name])
        return False


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trainable, and how many there are; of a packed weight of 4 bits all that it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # sharded by DeepSpeed, it is empty
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


# What PEFT takes to place a model on several devices; vectors lie where their layers do.
_PLACING = {
    *("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *("torch_device", "torch_dtype", "dtype"),
}


def _loading_arguments(ephemeral_gpu_offload: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `checkpoint.load_adapter` takes, of a PEFT script's keyword arguments.

    Raises:
        InputError: arguments that are not known, or are another method's.
    """
    if ephemeral_gpu_offload:
        raise InputError("Expected no ephemeral_gpu_offload, which is for LoRA; (IA)³ has nothing to offload.")
    given = {name: value for name, value in kwargs.items() if value is not None}
    if given.get("use_safetensors"):  # they come first in any case
        del given["use_safetensors"]
    placing = [name for name in given if name in _PLACING]
    if placing:
        warnings.warn(f"{shown(placing)}: ignored, for an adapter's vectors lie where their layers do.", stacklevel=3)
    own = {name: given.pop(name) for name in ("ignore_mismatched_sizes",) if name in given}
    return own | hub_arguments({name: value for name, value in given.items() if name not in placing})
