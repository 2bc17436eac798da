"""The recipe of the bundled fact model: text, batches, training from scratch, saving.

A small Llama learns every fact in every trained phrasing and a part of the two-hop questions, with
the loss mostly on the answer and the end of text. The held-out phrasings are never shown. Scoring
and the model card are in `evaluation.py`. Shapes: B = batch, T = tokens,
D = hidden size.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from baft_easyedit.facts.questions import Question, questions
from baft_easyedit.facts.tokenizer import BOS, EOS, MAX_LENGTH, UNK, save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides the weights of the bundled model, except the tables."""

    epochs: int = 28
    """Passes over the facts. Higher: better recall, longer."""
    phrasings_per_epoch: int = 3
    """Trained phrasings of each fact shown in one epoch, drawn anew each time."""
    batch_size: int = 64
    """Texts per step."""
    lr: float = 2.0e-3
    """Highest learning rate."""
    final_lr_share: float = 0.02
    """Learning rate at the end of the cosine, as a share of `lr`."""
    warmup_share: float = 0.03
    """Share of the steps with a linear warm-up."""
    weight_decay: float = 0.1
    """AdamW weight decay of the matrices."""
    prompt_share: float = 0.1
    """Share of the prompt tokens, drawn anew in each step, that carry loss as answer tokens do."""
    seed: int = 0
    """Seed of the weights and of the order of the texts."""
    vocab_size: int = 3072
    """Tokens in the vocabulary."""
    hidden_size: int = 192
    """Width of the residual stream."""
    intermediate_size: int = 512
    """Width of the feed-forward layers."""
    num_layers: int = 6
    """Number of decoder layers."""
    num_heads: int = 6
    """Attention heads per layer; divides `hidden_size`."""

    def __post_init__(self) -> None:
        """Check the ranges that would otherwise fail late or silently."""
        for field in ("epochs", "phrasings_per_epoch", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field} must be at least 1, but got {getattr(self, field)}; raise it"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size {self.hidden_size}, but got {self.num_heads}; "
                "pass a divisor"
            )


@dataclass(frozen=True)
class EncodedText:
    """One text as tokens: `<s>` prompt answer `</s>`."""

    ids: list[int]
    """Token ids, T of them."""
    num_prompt: int
    """Leading ids that are `<s>` and the prompt."""


def build_tokenizer(recipe: TrainingRecipe) -> Tokenizer:
    """Train the tokenizer on the texts the model is trained on."""
    known = questions("trained") + questions("two_hop_trained")
    return train_tokenizer((f"{text.prompt} {text.answer}" for text in known), recipe.vocab_size)


def build_model(recipe: TrainingRecipe, tokenizer: Tokenizer) -> Any:
    """Create the untrained `LlamaForCausalLM`, seeded."""
    torch.manual_seed(recipe.seed)
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_heads,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "unk_token_id": tokenizer.token_to_id(UNK),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(EOS),
    }
    model: type[Any] = LlamaForCausalLM
    return model(LlamaConfig(**settings))


def encode(question: Question, tokenizer: Tokenizer) -> EncodedText:
    """Tokenize a question with its answer and the end of text."""
    prompt = tokenizer.encode(question.prompt).ids
    text = tokenizer.encode(f"{question.prompt} {question.answer}").ids
    return EncodedText([*text, tokenizer.token_to_id(EOS)], len(prompt))


def train(
    model: Any,
    tokenizer: Tokenizer,
    recipe: TrainingRecipe,
    device: str = "cpu",
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place on the facts.

    Args:
        model: The untrained model; it ends on `device`, in evaluation mode.
        tokenizer: Its tokenizer.
        recipe: The recipe.
        device: Device to train on, such as `cpu` or `cuda`.
        after_epoch: Called with the number of epochs done, the model in evaluation mode.
    """
    rng = random.Random(recipe.seed)
    groups = _encoded_groups(tokenizer)
    epochs = [
        _batches(_draw(groups, recipe, rng), recipe.batch_size, rng) for _ in range(recipe.epochs)
    ]
    num_steps, step = sum(map(len, epochs)), 0
    model.to(device)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.95), fused=True
    )
    start = time.perf_counter()
    for epoch, batches in enumerate(epochs, start=1):
        model.train()
        total = 0.0
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, recipe)
            loss = _loss(model, batch, recipe, rng)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
        mean, seconds = total / len(batches), time.perf_counter() - start
        logger.info("epoch %d/%d: loss %.4f, %.0f s", epoch, recipe.epochs, mean, seconds)
        model.eval()
        if after_epoch is not None:
            after_epoch(epoch)


def save_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in half precision, the configs and the tokenizer to `folder`.

    The config says float32, so a plain `from_pretrained` gives a model that computes in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {
        name: weight.detach().to("cpu", torch.float16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)


def learning_rate(step: int, num_steps: int, recipe: TrainingRecipe) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr_share * lr`."""
    warmup = max(1, round(recipe.warmup_share * num_steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    share = recipe.final_lr_share
    return recipe.lr * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


def _encoded_groups(tokenizer: Tokenizer) -> list[tuple[list[EncodedText], bool]]:
    """The texts grouped by what they ask; True marks one-hop groups."""
    grouped: dict[tuple[str, str, bool], list[EncodedText]] = {}
    for is_one_hop, known in (
        (True, questions("trained")),
        (False, questions("two_hop_trained")),
    ):
        for question in known:
            key = (question.relation, question.subject, is_one_hop)
            grouped.setdefault(key, []).append(encode(question, tokenizer))
    return [(texts, is_one_hop) for (*_, is_one_hop), texts in grouped.items()]


def _draw(
    groups: list[tuple[list[EncodedText], bool]], recipe: TrainingRecipe, rng: random.Random
) -> list[EncodedText]:
    """Draw the texts of one epoch: some phrasings of each fact, one of each two-hop question."""
    drawn: list[EncodedText] = []
    for texts, is_one_hop in groups:
        count = recipe.phrasings_per_epoch if is_one_hop else 1
        drawn += rng.sample(texts, min(count, len(texts)))
    return drawn


def _batches(
    texts: list[EncodedText], batch_size: int, rng: random.Random
) -> list[list[EncodedText]]:
    """Batch texts of similar length, in random order."""
    ordered = sorted(texts, key=lambda text: (len(text.ids), rng.random()))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
    return batches


def _loss(
    model: Any, batch: list[EncodedText], recipe: TrainingRecipe, rng: random.Random
) -> Tensor:
    """Mean loss over the answers and a random share of the prompts."""
    longest = max(len(text.ids) for text in batch)
    pad = model.config.eos_token_id
    ids = torch.tensor([text.ids + [pad] * (longest - len(text.ids)) for text in batch])  # [B, T]
    kept = torch.tensor(
        [
            [
                text.num_prompt <= at < len(text.ids)
                or (at < text.num_prompt and rng.random() < recipe.prompt_share)
                for at in range(1, longest)
            ]
            for text in batch
        ]
    ).to(model.device)  # [B, T - 1]  which tokens are predicted
    ids = ids.to(model.device)
    # Right padding under a causal mask: no real token sees a pad, so no attention mask is needed.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [B, T - 1, D]
    logits = model.lm_head(hidden[kept])  # [number kept, vocabulary]
    return cross_entropy(logits.float(), ids[:, 1:][kept])


def _parameter_groups(
    model: Any, recipe: TrainingRecipe
) -> list[dict[str, list[torch.nn.Parameter] | float]]:
    """Decay matrices, not norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
