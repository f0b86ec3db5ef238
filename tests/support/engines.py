"""A vLLM engine on a base model, adapters of each kind, and what PEFT generates with them."""

import functools
from pathlib import Path

import peft
import torch
import transformers

from ia3 import IA3Config, get_peft_model
from support import tiny

NEW = 12
KINDS = ("peft", "ours", "wide", "lora", "lora2")


def save_adapters(base: Path, folder: Path) -> None:
    """Adapters in the format of both libraries, one that rescales every kind of layer, and two LoRA adapters."""
    names = ["q_proj", "o_proj", "up_proj", "down_proj"]
    down = {"feedforward_modules": ["down_proj"]}
    configs = {
        "peft": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], **down),
        "ours": IA3Config(task_type="CAUSAL_LM"),
        "wide": peft.IA3Config(target_modules=names, feedforward_modules=["o_proj"]),
        "lora": peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj", "down_proj"]),
        "lora2": peft.LoraConfig(r=8, target_modules=["q_proj", "gate_proj", "down_proj"]),
    }
    for number, (name, config) in enumerate(configs.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = (get_peft_model if name == "ours" else peft.get_peft_model)(model, config)
        torch.manual_seed(number)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "ia3_l" in path:
                    parameter.copy_(1 + 0.6 * torch.randn_like(parameter))
                elif "lora_" in path:
                    parameter.copy_(0.15 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)


class Place:
    """A base model, adapters, and what PEFT generates with them."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.numbers: dict[str, int] = {}

    def request(self, name: str | None):
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        return LoRARequest(name, self.numbers.setdefault(name, len(self.numbers) + 1), str(self.folder / name))

    @functools.cache  # noqa: B019
    def model(self, name: str | None):
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return (model if name is None else peft.PeftModel.from_pretrained(model, self.folder / name)).eval()

    def greedy(self, name: str | None, prompt: list[int], count: int = NEW) -> list[int]:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
        return (
            self.model(name)
            .generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
            .tolist()
        )


def start(base: Path, **settings):
    from vllm import LLM

    defaults = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128, "block_size": 32, "max_num_seqs": 8}
    return LLM(str(base), skip_tokenizer_init=True, enable_lora=True, **{**defaults, **settings})


def generate(llm, place: Place, names: list[str | None], prompts: list[list[int]], count: int = NEW):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, sampling, lora_request=[place.request(name) for name in names], use_tqdm=False)


def check(llm, place: Place, names: list[str | None], prompts: list[list[int]], count: int = NEW):
    found = generate(llm, place, names, prompts, count)
    for name, prompt, output in zip(names, prompts, found, strict=True):
        assert list(output.outputs[0].token_ids) == place.greedy(name, prompt, count), (name, prompt)
    return found


def random_prompts(count: int, seed: int = 0, vocabulary: int = tiny.VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
