"""What an adapter is, and its JSON: `IA3Config`, with PEFT's fields, defaults and file format."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from dataclasses import InitVar, asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, Literal

from ia3.errors import InputError, brief, excerpt, shown
from ia3.files import (
    CONFIG_NAME,
    PENDING,
    TEMPORARY,
    at_revision,
    hub_arguments,
    locate,
    parse_json,
    reading,
    replacing,
    upload,
)

# Keys that PEFT writes beside its fields: provenance and settings of a run, nothing that changes an output.
_PROVENANCE_KEYS = {"peft_version", "runtime_config"}

# target_modules, feedforward_modules of PEFT 0.21, where they are not the model's keys, values and second
# feed-forward input. `IA3Config.from_peft_defaults` is for those who need PEFT's choice; ours is in `targets`.
_PEFT_DEFAULTS: dict[str, tuple[list[str], list[str]]] = {
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    **dict.fromkeys(("bert", "roberta"), (["key", "value", "output.dense"], ["output.dense"])),
    **dict.fromkeys(("bart", "phi"), (["q_proj", "v_proj", "fc2"], ["fc2"])),
    **dict.fromkeys(("llama", "mistral"), (["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
    **dict.fromkeys(
        ("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"),
        (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    ),
}


class PeftType(str, Enum):
    """The kind of adapter, by PEFT's name for it."""

    IA3 = "IA3"

    def __str__(self) -> str:
        return self.value


# What a file says in place of "IA3" when vectors act from the question on: PEFT refuses a peft_type that it does not know,
# while it would only warn of an unknown key, and let the vectors act on the whole text, or look for an encoder's.
_FROM_QUESTION = "IA3_FROM_QUESTION"


def is_ia3(values: Any) -> bool:
    """Whether these are the fields of an (IA)³ adapter's config, from wherever it acts."""
    return isinstance(values, dict) and values.get("peft_type") in (PeftType.IA3, _FROM_QUESTION)


class TaskType(str, Enum):
    """What the adapted model is for; SEQ_CLS, TOKEN_CLS and QUESTION_ANS train the head as well."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


@dataclass
class IA3Config:
    """The configuration of one (IA)³ adapter. Fields, order, defaults and JSON are PEFT's.

    Args:
        task_type: what the model is for. SEQ_CLS, TOKEN_CLS and QUESTION_ANS add the head to `modules_to_save`.
        peft_type: always "IA3".
        auto_mapping: the base model's class and library, written when there is no `task_type`.
        base_model_name_or_path: the model that the adapter belongs to; see also `base`.
        revision: the base model's revision on the hub.
        inference_mode: the adapter is added frozen.
        target_modules: which modules to rescale. A string is a regular expression for the whole module path; a list
            matches a path that equals an entry or ends in `.entry`; "all-linear" is every Linear and Conv1D but the
            output layer. None: keys, values and the feed-forward's second input, by the model's architecture.
        exclude_modules: taken out of the targets; matched in the same way.
        feedforward_modules: the targets whose *input* is rescaled; of the others it is the output. Beside the
            architecture's choice an input that is left out ([]: all) moves to the output of the projection beside the
            gate, `up_proj` or `wi_1`, which is the same function; without a gate it is an error.
        fan_in_fan_out: the weight is stored (in, out). Corrected with a warning where it contradicts the layer.
        modules_to_save: modules trained in full, one copy an adapter, and saved with it.
        init_ia3_weights: start from ones, which change nothing. False: random vectors, for tests.
        acts_from: "start" rescales the activations of all tokens, as PEFT does; "question" only those from the question
            on, so that the frozen model reads the text in front of it once for any number of adapters and questions (see
            `IA3Model.forward`). In an encoder-decoder these are the decoder's: of the targets, only its modules have
            vectors. PEFT refuses to load such an adapter, and it cannot be merged.

    Raises:
        InputError: `feedforward_modules` is no subset of `target_modules` (two lists), or a type is not known.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    feedforward_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    acts_from: Literal["start", "question"] = "start"
    peft_version: InitVar[str | None] = None  # what PEFT wrote the config; of no consequence

    # Not a field: whether `target_modules` was left to the architecture, which a completed config no longer shows.
    chosen_by_architecture = False

    def __post_init__(self, peft_version: str | None) -> None:
        if self.peft_type not in (None, PeftType.IA3):
            raise InputError(
                f"Expected peft_type 'IA3', found {brief(_plain(self.peft_type))}: this is another method's config."
            )
        self.peft_type = PeftType.IA3
        if self.task_type is not None:
            known = [task.value for task in TaskType]
            if self.task_type not in known:
                raise InputError(f"Expected a task_type of {shown(known, 9)}, found {brief(self.task_type)}.")
            self.task_type = TaskType(self.task_type)
        for name in ("inference_mode", "fan_in_fan_out", "init_ia3_weights"):
            _require(name, getattr(self, name), bool, "true or false")
        if self.acts_from not in ("start", "question"):
            raise InputError(f"Expected `acts_from` to be 'start' or 'question', found {brief(self.acts_from)}.")
        for name in ("base_model_name_or_path", "revision"):
            _require(name, getattr(self, name), (str, type(None)), "text or nothing")
        _require("auto_mapping", self.auto_mapping, (dict, type(None)), "a mapping of names or nothing")
        for value in (self.auto_mapping or {}).values():
            _require("auto_mapping", value, (str, bool, int, float, type(None)), "a mapping of names")
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(_names(name, value)))
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            surplus = sorted(self.feedforward_modules - self.target_modules)
            if surplus:
                raise InputError(
                    f"`feedforward_modules` should be a subset of `target_modules`, found {shown(surplus)} beside "
                    f"{shown(sorted(self.target_modules))}; add them to `target_modules` too."
                )

    @classmethod
    def from_peft_defaults(cls, model_type: str, **kwargs: Any) -> IA3Config:
        """PEFT's own choice of modules for an architecture (`config.model_type`), where it differs from the paper's.

        Raises:
            InputError: PEFT has no default for this architecture.
        """
        if model_type not in _PEFT_DEFAULTS:
            raise InputError(
                f"PEFT has no default (IA)³ modules for {brief(model_type)}; it has for "
                f"{shown(sorted(_PEFT_DEFAULTS), 99, room=400)}."
            )
        targets, feedforward = _PEFT_DEFAULTS[model_type]
        return cls(target_modules=targets, feedforward_modules=feedforward, **kwargs)

    @property
    def base(self) -> str | None:
        """The base model as `load_base` takes it: its name, with the revision if there is one ("owner/name@v1")."""
        name = self.base_model_name_or_path
        if not name or self.revision is None or os.path.exists(name) or at_revision(name)[1] is not None:
            return name
        return f"{name}@{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; sets become sorted lists. Those of PEFT's adapters are PEFT's, which has a base
        model's revision apart from its name."""
        values = {
            key: sorted(value) if isinstance(value, set) else _plain(value) for key, value in asdict(self).items()
        }
        if self.base_model_name_or_path and at_revision(self.base_model_name_or_path)[1] is not None:
            values["base_model_name_or_path"], values["revision"] = at_revision(self.base_model_name_or_path)
        if self.acts_from == "start":
            del values["acts_from"]
        else:
            values["peft_type"] = _FROM_QUESTION
        return values

    def to_json(self) -> str:
        """What `adapter_config.json` holds."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IA3Config:
        """The config of a dictionary; keys that are not (IA)³'s are ignored with a warning that names them."""
        if values.get("peft_type") == _FROM_QUESTION:
            values = {"acts_from": "question", **values, "peft_type": PeftType.IA3}
        if values.get("peft_type") not in (None, PeftType.IA3):
            found = brief(values["peft_type"])
            raise InputError(f"Expected an (IA)³ adapter (peft_type 'IA3'), found peft_type {found}.")
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names - _PROVENANCE_KEYS)
        if unknown:
            warnings.warn(f"Ignoring keys of a newer or another config: {shown(unknown, 99)}.", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> IA3Config:
        """The config of keyword arguments, as `from_dict`."""
        return cls.from_dict(kwargs)

    @property
    def is_prompt_learning(self) -> bool:
        """False: (IA)³ learns no prompts."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False, as `is_prompt_learning`."""
        return False

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike) -> dict[str, Any]:
        """The fields in one JSON file, as PEFT gives them. Raises `InputError` when it is no adapter config."""
        with reading(path_json_file, "an adapter config"), open(path_json_file, "rb") as file:
            data = file.read()
        return cls._fields_in(data, path_json_file)

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike) -> IA3Config:
        """The config in what was read from `path`. Raises `InputError` when it is no adapter config."""
        return cls.from_dict(cls._fields_in(data, path))

    @staticmethod
    def _fields_in(data: bytes, path: str | os.PathLike) -> dict[str, Any]:
        values = parse_json(data, path)
        if not isinstance(values, dict) or "peft_type" not in values:
            raise InputError(
                f"Expected an adapter config with a peft_type in {excerpt(str(path))}; this is another kind of JSON."
            )
        return values

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> IA3Config:
        """Read `adapter_config.json` from a folder or a hub repository (`revision`, `token`, … as of the hub)."""
        place = hub_arguments(hub_kwargs)
        return cls.from_dict(cls.from_json_file(locate(path, CONFIG_NAME, subfolder=subfolder, **place)))

    def save_pretrained(self, folder: str | os.PathLike, auto_mapping_dict: dict[str, str] | None = None) -> None:
        """Write `adapter_config.json` into a folder, which is made when it is not there.

        Args:
            folder: where.
            auto_mapping_dict: written as `auto_mapping`; None: the config's own.

        Raises:
            InputError: the path is a file.
        """
        if os.path.isfile(folder):
            raise InputError(f"Provided path ({brief(str(folder))}) should be a directory, not a file.")
        if auto_mapping_dict is not None:
            replace(self, auto_mapping=auto_mapping_dict).save_pretrained(folder)
            return
        with replacing(os.path.join(folder, CONFIG_NAME)) as path:
            path.write_text(self.to_json(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload `adapter_config.json` to a hub repository. Args and result: see `PeftModel.push_to_hub`."""
        kwargs.setdefault("commit_message", "Upload config")
        return upload(self.save_pretrained, repo_id, private, token, **kwargs)


def require_config(found: Any) -> None:
    """Raise `InputError` for anything but an `IA3Config`, such as PEFT's class of this name."""
    if not isinstance(found, IA3Config):
        kind = type(found)
        raise InputError(
            f"Expected ia3.IA3Config, found {kind.__module__.partition('.')[0]}.{kind.__qualname__}",
            "import it from ia3",
        )


def _names(field: str, value: Any) -> list[str]:
    """A list of names, or an error that says what stands there instead."""
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        raise InputError(f"Expected `{field}` to be a list of module names, found {brief(value)}.")
    return list(value)


def _require(field: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds):
        raise InputError(f"Expected `{field}` of an adapter config to be {expected}, found {brief(value)}.")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def adapter_folders(root: str) -> dict[str, str]:
    """Every folder below a folder that has an adapter's config, by its relative path with slashes, sorted."""
    found = {}
    waiting = [(root, "")]
    while waiting:
        folder, name = waiting.pop()
        # One that was there a moment ago may be gone: uploads come and go.
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as children:
            for child in children:
                path = f"{name}/{child.name}" if name else child.name
                if child.name == PENDING or (child.name == CONFIG_NAME and not child.is_dir()):
                    if name:
                        found[name] = folder
                elif child.name.startswith(TEMPORARY):
                    continue
                elif child.is_symlink():  # a link may lead back up: it is looked at, not into
                    if os.path.isfile(os.path.join(child.path, CONFIG_NAME)):
                        found[path] = child.path
                elif child.is_dir():
                    waiting.append((child.path, path))
    return dict(sorted(found.items()))
