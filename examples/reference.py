"""(IA)³ and T-Few in one file, to read from top to bottom: Liu et al. 2022, https://arxiv.org/abs/2205.05638.

A frozen language model becomes a classifier of texts by a few thousand numbers, trained on a few labelled examples. This
file shows all that happens, in plain torch and without regard for speed. The tests hold the package to its numbers.

    python examples/reference.py [MODEL]

MODEL is a folder or a hub id of a LLaMA-like decoder or of a T5.
"""

import random
import sys

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

# A task puts a row into words: a prompt, and an answer text for each label, the "choices". A decoder continues the
# prompt, so its choices begin with a space.
PROMPT = "Review: {text}\nIs the review good or bad? It is"
CHOICES = {"positive": " good", "negative": " bad"}


# 1. (IA)³, section 3.3 ------------------------------------------------------------------------------------------------
#
#     attention:     softmax(Q (l_k ⊙ Kᵀ) / √d_k) (l_v ⊙ V)
#     feed-forward:  (l_ff ⊙ γ(W₁ x)) W₂
#
# K and V are outputs of linear layers, and γ(W₁ x), which is gated in a LLaMA, is the input of the second one.

KEYS_AND_VALUES = ("k_proj", "v_proj", "k", "v")  # in a LLaMA, in a T5
SECOND_OF_FEED_FORWARD = ("down_proj", "wo")


def add_vectors(model):
    """Freeze a model and rescale its activations; returns the vectors by their layers' names, all trained numbers there are."""
    model.requires_grad_(False).eval()
    vectors = {}
    for path, layer in model.named_modules():
        name = path.split(".")[-1]
        if name in KEYS_AND_VALUES:
            vector = torch.ones(layer.out_features, requires_grad=True)  # ones: nothing has changed yet
            layer.register_forward_hook(lambda layer, inputs, output, vector=vector: vector * output)
        elif name in SECOND_OF_FEED_FORWARD:
            vector = torch.ones(layer.in_features, requires_grad=True)
            layer.register_forward_pre_hook(lambda layer, inputs, vector=vector: (vector * inputs[0],))
        else:
            continue
        vectors[path] = vector
    return vectors


# 2. Scores, section 3.2 -----------------------------------------------------------------------------------------------


def token_log_probs(model, tokenizer, prompt, choice):
    """log p(y_t | x, y_<t) for each token y_t of a choice y behind a prompt x."""
    x = tokenizer(prompt).input_ids
    if model.config.is_encoder_decoder:  # the encoder reads x, the decoder writes y and closes it
        y = tokenizer(text_target=choice.strip()).input_ids
        logits = model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).logits[0]
    else:  # y continues x; the last token is predicted, never read
        y = tokenizer(choice, add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([x + y[:-1]])).logits[0, len(x) - 1 :]
    return logits.log_softmax(-1)[range(len(y)), y]


def score(log_probs):
    """β(x, y) = 1/T Σ_t log p(y_t | x, y_<t): long choices and short ones have the same chances."""
    return log_probs.mean()


def predict(model, tokenizer, text):
    """Each label's probability, the softmax of the scores. The prediction is the most probable one."""
    with torch.no_grad():
        prompt = PROMPT.format(text=text)
        scores = [score(token_log_probs(model, tokenizer, prompt, choice)) for choice in CHOICES.values()]
    return dict(zip(CHOICES, torch.stack(scores).softmax(0).tolist(), strict=True))


# 3. The loss, section 3.2 ---------------------------------------------------------------------------------------------


def losses(model, tokenizer, text, label):
    """The three terms for one example, with y the right choice and ŷ⁽¹⁾ … ŷ⁽ᴺ⁾ the wrong ones."""
    prompt = PROMPT.format(text=text)
    found = {name: token_log_probs(model, tokenizer, prompt, choice) for name, choice in CHOICES.items()}
    right, wrong = found[label], torch.cat([found[name] for name in found if name != label])

    # Make the right choice probable. L_LM = -1/T Σ_t log p(y_t | x, y_<t)
    likelihood = -right.mean()

    # Make the wrong choices improbable. Equation 1: L_UL = -Σ_n Σ_t log(1 - p(ŷ⁽ⁿ⁾_t | x, ŷ⁽ⁿ⁾_<t)) / Σ_n T⁽ⁿ⁾
    # The factor is not the paper's: where p is 1, the logarithm has no value.
    unlikelihood = -torch.log(1 - 0.999 * wrong.exp()).mean()

    # Score the right choice above the wrong ones. Equation 2: L_LN = -log(exp β(x, y) / (exp β(x, y) + Σ_n exp β(x, ŷ⁽ⁿ⁾)))
    scores = torch.stack([score(log_probs) for log_probs in found.values()])
    length_normalized = F.cross_entropy(scores, torch.tensor([*CHOICES].index(label)))

    return likelihood, unlikelihood, length_normalized  # L is their sum, without weights


# 4. The recipe, section 3.5: 1,000 steps of 8 examples, Adafactor, 3e-3, linear decay after a warm-up over 60 steps -----


def learning_rate(step, steps, highest=3e-3):
    """The rate of a step, counted from 0."""
    warmup = -(-6 * steps // 100)  # 6 %, rounded up
    return highest * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


def adafactor(vector, squares, step, rate):
    """One step, counted from 0, of Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 5) for one vector.

    As T-Few has it: without momentum, and the rate is the schedule's alone. Its savings by factors are for matrices.
    """
    forget = 1 - (step + 1) ** -0.8
    squares.mul_(forget).add_((1 - forget) * (vector.grad**2 + 1e-30))  # the running mean of g²
    update = vector.grad / squares.sqrt()
    update /= max(1.0, update.pow(2).mean().sqrt())  # no larger than 1 in its root mean square
    vector.data -= rate * update


def train(model, tokenizer, vectors, examples, steps=1000, batch_size=8, seed=0):
    """Train vectors on pairs of text and label."""
    chance = random.Random(seed)
    squares = {path: torch.zeros_like(vector) for path, vector in vectors.items()}
    for step in range(steps):
        for vector in vectors.values():
            vector.grad = None
        batch = chance.sample(examples, min(batch_size, len(examples)))
        for text, label in batch:  # gradients add up to that of the batch's mean loss
            loss = sum(losses(model, tokenizer, text, label))
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(vectors.values(), 1.0)  # not in the paper: what trainers usually do
        for path, vector in vectors.items():
            adafactor(vector, squares[path], step, learning_rate(step, steps))


# 5. All together ------------------------------------------------------------------------------------------------------

EXAMPLES = [
    ("Fresh, crisp and gone in a day.", "positive"),
    ("Half of the cans were dented.", "negative"),
    ("The best coffee that I have had at home.", "positive"),
    ("Stale, and far too sweet.", "negative"),
]


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct"):
    """Train a model's vectors on the examples, and ask it about another text."""
    encoder_decoder = AutoConfig.from_pretrained(name).is_encoder_decoder
    family = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model, tokenizer = family.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    vectors = add_vectors(model)
    print(f"{sum(vector.numel() for vector in vectors.values()):,} numbers to train")
    text = "My dog would not touch it."
    print("before:", predict(model, tokenizer, text))
    train(model, tokenizer, vectors, EXAMPLES, steps=20)  # a small model has learned so few by heart then
    print("after: ", predict(model, tokenizer, text))


if __name__ == "__main__":
    main(*sys.argv[1:2])
