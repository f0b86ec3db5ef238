"""Load a saved adapter with the base model that its config names: `AutoPeftModelForCausalLM` and others."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from ia3.adapter.config import IA3Config, TaskType
from ia3.adapter.peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from ia3.adapter.pretrained import find_base
from ia3.adapter.stored import StoredAdapter
from ia3.errors import InputError, brief, reason, shown
from ia3.files import HUB_ARGUMENTS, locate, reading


class AutoPeftModel:
    """Loads a base model, with the class in the adapter's config, and the adapter."""

    task_type: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        raise InputError(
            f"{type(self).__name__} is not made directly; use {type(self).__name__}.from_pretrained(path)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter's base model and the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub repository. If it also has a tokenizer with more
                tokens than the base model's vocabulary, the embeddings are resized.
            adapter_name: the adapter's name in the model.
            is_trainable: make the adapter trainable.
            config: a config to use instead of the saved one.
            revision: the adapter's revision on the hub.
            **kwargs: arguments of the base model's `from_pretrained` (`dtype`, `device_map`, …), and the hub's `token`,
                `cache_dir`, `subfolder`, ….

        Raises:
            InputError: there is no adapter; its task needs another class; its config names no base model, or one that
                cannot be loaded; or the adapter does not fit the base model.
        """
        place = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs} | {"revision": revision}
        folder = StoredAdapter(pretrained_model_name_or_path, **place)
        given, config = config, config or folder.config
        if not config.base_model_name_or_path:
            raise InputError(
                f"The config in {str(pretrained_model_name_or_path)!r} names no base model (base_model_name_or_path); "
                f"load that yourself and call PeftModel.from_pretrained(model, path)."
            )
        _, source = find_base(config.base_model_name_or_path, kwargs.get("cache_dir"))
        base_class = cls._base_class(config)
        kwargs.pop("subfolder", None)  # the adapter's
        try:
            model = base_class.from_pretrained(source, **{"revision": config.revision, **kwargs})
        except Exception as error:  # a damaged file, a missing package, another type of model
            raise InputError(
                f"Cannot load the base model {brief(config.base_model_name_or_path)} as {base_class.__name__}: "
                f"{reason(error)}"
            ) from error
        cls._fit_tokenizer(model, pretrained_model_name_or_path, place)
        chosen = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task_type or "", PeftModel)
        return chosen.from_pretrained(model, folder, adapter_name, is_trainable, given)

    @classmethod
    def _base_class(cls, config: IA3Config) -> Any:
        import transformers

        wanted = TaskType(config.task_type) if config.task_type else None
        if cls.task_type is not None and wanted not in (None, cls.task_type):
            raise InputError(
                f"{cls.__name__} is for {cls.task_type.value}, the adapter is for {wanted.value}; use "  # type: ignore[union-attr]
                f"{_BY_TASK[wanted].__name__}."  # type: ignore[index]
            )
        task = cls.task_type or wanted
        if task is not None:
            return getattr(transformers, _BASE_CLASSES[task])
        mapping = config.auto_mapping or {}
        library, name = (str(mapping.get(key) or "") for key in ("parent_library", "base_model_class"))
        # The file names the module to import. Allow only transformers, or a downloaded adapter could run any module.
        if library.split(".")[0] != "transformers":
            raise InputError(
                f"Expected a task_type in the adapter's config, or an auto_mapping to a class of transformers, found "
                f"{brief(name)} of {brief(library)}; use {shown([c.__name__ for c in _BY_TASK.values()], 9, room=400)}."
            )
        try:
            base_class = getattr(importlib.import_module(library), name)
        except Exception as error:  # there is no such module or class, or its imports are not installed
            raise InputError(
                f"The base model's class {brief(name)} is not in this version's {brief(library)}."
            ) from error
        if not (isinstance(base_class, type) and issubclass(base_class, transformers.PreTrainedModel)):
            raise InputError(f"Expected a model's class in the adapter's auto_mapping, found {name!r} of {library!r}.")
        return base_class

    @staticmethod
    def _fit_tokenizer(model: Any, path: str | os.PathLike, place: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        try:
            locate(path, "tokenizer_config.json", **place)
        except InputError:
            return
        with reading(path, "a tokenizer's files"):
            tokenizer = AutoTokenizer.from_pretrained(path, **{key: value for key, value in place.items() if value})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter for text generation, and its base model."""

    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter for an encoder-decoder, and its base model."""

    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter for text classification, and its base model."""

    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter for token classification, and its base model."""

    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter for question answering, and its base model."""

    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter for a model without a head, and its base model."""

    task_type = TaskType.FEATURE_EXTRACTION


_BASE_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_BY_TASK = {cls.task_type: cls for cls in AutoPeftModel.__subclasses__()}
