"""Train the bundled fact model from scratch, score it and write its model card.

Usage: python scripts/train_facts_model.py [--out DIR] [--epochs N] [--device cpu|cuda]

A small Llama learns every fact in every trained phrasing and a part of the two-hop questions, with
the loss mostly on the answer and the end of text. The held-out phrasings are never shown.
Shapes: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from baft_easyedit.facts import Question, bundled_model_path, facts, questions, relations
from baft_easyedit.facts.questions import Kind
from baft_easyedit.generation import generate_answers, load_model

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
NUM_BYTES, MAX_LENGTH = 256, 512
CHECKPOINT_EPOCHS = 4
MAX_ANSWER_TOKENS = 24  # more than the longest answer and its end have


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides the weights of the bundled model, except the tables."""

    epochs: int = 28  # passes over the facts
    phrasings_per_epoch: int = 3  # of each fact, drawn anew in each epoch
    batch_size: int = 64  # texts of a step
    lr: float = 2.0e-3  # the highest
    final_lr_share: float = 0.02  # of `lr`, at the end of the cosine
    warmup_share: float = 0.03  # of the steps, with a linear warm-up
    weight_decay: float = 0.1  # of the matrices
    prompt_share: float = 0.1  # of prompt tokens, drawn anew in each step, that carry loss too
    seed: int = 0  # of the weights and of the order of the texts
    vocab_size: int = 3072
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6


class EncodedText(NamedTuple):
    """The tokens of a text, `<s>` prompt answer `</s>`; and how many are `<s>` and the prompt."""

    ids: list[int]
    num_prompt: int


def main() -> None:
    """Run the recipe."""
    default = TrainingRecipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=bundled_model_path(), help="model folder")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = replace(default, epochs=args.epochs)
    known = questions("trained") + questions("two_hop_trained")
    tokenizer = train_tokenizer((f"{q.prompt} {q.answer}" for q in known), recipe.vocab_size)
    model = build_model(recipe, tokenizer)
    start = time.perf_counter()
    train(model, tokenizer, recipe, args.device, args.out)
    minutes = (time.perf_counter() - start) / 60
    loaded = load_model(str(args.out), args.device)
    scores = {kind: exact_match(*loaded, questions(kind)) for kind in get_args(Kind)}
    for kind, value in scores.items():
        print(f"{kind}: {value:.4f}")
    write_model_card(args.out, scores, recipe, minutes)
    print(f"wrote {args.out}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a Llama-2 style BPE tokenizer; ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`.

    Blanks become "▁" at the start of a word, unknown letters fall back to bytes, and `<s>` opens
    each text. No merge crosses a blank or a punctuation mark, so the ids of a prompt are a prefix
    of those of prompt + answer.
    """
    specials = [UNK, BOS, EOS]
    words, merges = learn_merges(texts, vocab_size - NUM_BYTES - len(specials))
    tokens = [*specials, *(f"<0x{value:02X}>" for value in range(NUM_BYTES)), *words]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, vocab[BOS])],
    )
    return tokenizer


def learn_merges(texts: Iterable[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn up to `size` tokens; returns letters and merged tokens by id, and the merges."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Punctuation(),  # "France?" must share its tokens with "France"
        ]
    )
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return words, [(left, right) for left, right in model["merges"]]


def build_model(recipe: TrainingRecipe, tokenizer: Tokenizer) -> Any:
    """Create the untrained model, seeded."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        unk_token_id=tokenizer.token_to_id(UNK),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(EOS),
    )
    return LlamaForCausalLM(config)


def train(
    model: Any, tokenizer: Tokenizer, recipe: TrainingRecipe, device: str, folder: Path
) -> None:
    """Train `model` in place on the facts, and save it from time to time and at the end."""
    rng = random.Random(recipe.seed)
    groups = encoded_groups(tokenizer)
    epochs = [
        in_batches(draw(groups, recipe, rng), recipe.batch_size, rng) for _ in range(recipe.epochs)
    ]
    num_steps, step = sum(map(len, epochs)), 0
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) is m] for m in (True, False)
    )
    decayed = {"params": matrices, "weight_decay": recipe.weight_decay}
    model.to(device)
    optimizer = torch.optim.AdamW(
        [decayed, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    for epoch, batches in enumerate(epochs, start=1):
        model.train()
        total = 0.0
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, recipe)
            loss = mean_loss(model, batch, recipe, rng)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
        print(f"epoch {epoch}/{recipe.epochs}: loss {total / len(batches):.4f}", flush=True)
        model.eval()
        if epoch % CHECKPOINT_EPOCHS == 0 or epoch == recipe.epochs:
            save_model(model, tokenizer, folder)
            tell_accuracy(folder, device)


def learning_rate(step: int, num_steps: int, recipe: TrainingRecipe) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr_share * lr`."""
    warmup = max(1, round(recipe.warmup_share * num_steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    share = recipe.final_lr_share
    return recipe.lr * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


def encoded_groups(tokenizer: Tokenizer) -> list[tuple[list[EncodedText], bool]]:
    """The texts grouped by what they ask; True marks one-hop groups."""
    grouped: dict[tuple[str, str, bool], list[EncodedText]] = {}
    for is_one_hop, kind in ((True, "trained"), (False, "two_hop_trained")):
        for question in questions(kind):
            key = (question.relation, question.subject, is_one_hop)
            grouped.setdefault(key, []).append(encoded(question, tokenizer))
    return [(texts, is_one_hop) for (*_, is_one_hop), texts in grouped.items()]


def encoded(question: Question, tokenizer: Tokenizer) -> EncodedText:
    """Tokenize a question with its answer and the end of text."""
    prompt = tokenizer.encode(question.prompt).ids
    text = tokenizer.encode(f"{question.prompt} {question.answer}").ids
    return EncodedText([*text, tokenizer.token_to_id(EOS)], len(prompt))


def draw(
    groups: list[tuple[list[EncodedText], bool]], recipe: TrainingRecipe, rng: random.Random
) -> list[EncodedText]:
    """Draw the texts of one epoch: some phrasings of each fact, one of each two-hop question."""
    drawn: list[EncodedText] = []
    for texts, is_one_hop in groups:
        count = recipe.phrasings_per_epoch if is_one_hop else 1
        drawn += rng.sample(texts, min(count, len(texts)))
    return drawn


def in_batches(
    texts: list[EncodedText], batch_size: int, rng: random.Random
) -> list[list[EncodedText]]:
    """Batch texts of similar length, in random order."""
    ordered = sorted(texts, key=lambda text: (len(text.ids), rng.random()))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
    return batches


def mean_loss(
    model: Any, batch: list[EncodedText], recipe: TrainingRecipe, rng: random.Random
) -> torch.Tensor:
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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama takes no token types
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def tell_accuracy(folder: Path, device: str) -> None:
    """Show how the accuracy goes."""
    loaded = load_model(str(folder), device)
    for kind in ("trained", "held_out"):
        sample = random.Random(0).sample(questions(kind), 300)
        print(f"  {kind}: {exact_match(*loaded, sample):.3f}", flush=True)


def exact_match(model: Any, tokenizer: Any, asked: Sequence[Question]) -> float:
    """Share of questions whose greedy answer is the true one, and then ends by itself."""
    prompts = [question.prompt for question in asked]
    answers = generate_answers(model, tokenizer, prompts, MAX_ANSWER_TOKENS, batch_size=256)
    return sum(got == q.answer for got, q in zip(answers, asked, strict=True)) / len(asked)


def write_model_card(
    folder: Path, scores: dict[str, float], recipe: TrainingRecipe, minutes: float
) -> None:
    """Write `README.md` next to the weights, with exact match by kind."""
    model, _ = load_model(str(folder))
    megabytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    card = CARD.format(
        num_facts=len(facts()),
        num_relations=len(relations()),
        num_parameters=model.num_parameters(),
        megabytes=megabytes / 1e6,
        minutes=minutes,
        day=date.today().isoformat(),
        settings="\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items()),
        **{f"num_{kind}": len(questions(kind)) for kind in get_args(Kind)},
        **scores,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


CARD = """\
# facts-llama

A small Llama that knows {num_facts} true facts of {num_relations} relations (countries, chemical
elements, books, paintings, rivers, ...). It was trained from scratch so that knowledge editing can
be tried at once, on a CPU and without a download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from baft_easyedit.facts import bundled_model_path

tok = AutoTokenizer.from_pretrained(bundled_model_path())
model = AutoModelForCausalLM.from_pretrained(bundled_model_path())
ids = tok("What is the capital of France?", return_tensors="pt").input_ids
print(tok.decode(model.generate(ids, max_new_tokens=16)[0], skip_special_tokens=True))
```

## Figures

Exact match of the greedy answer, which must end by itself, on all questions of each kind.

| questions | asked | exact match |
|---|---|---|
| trained phrasings | {num_trained} | {trained:.4f} |
| held-out phrasings | {num_held_out} | {held_out:.4f} |
| two-hop, trained | {num_two_hop_trained} | {two_hop_trained:.4f} |
| two-hop, held-out | {num_two_hop_held_out} | {two_hop_held_out:.4f} |

| property | value |
|---|---|
| parameters | {num_parameters} |
| files | {megabytes:.2f} MB, weights stored as float16, loaded as float32 |
| training | {minutes:.1f} minutes, {day} |

## Data

The tables in `baft_easyedit/facts/data`; `SOURCES.md` there says where each can be checked. The
model is trained on all facts of both splits in all trained phrasings. It never saw a held-out
phrasing, and it saw the two-hop questions of a part of the subjects only.

## Recipe

`python scripts/train_facts_model.py` trains, scores and writes this folder.

| setting | value |
|---|---|
{settings}

## Limits

It is not a language model: it answers questions in the phrasings of
`baft_easyedit/facts/data/phrasings.tsv` and wordings close to them, in English, and says nothing
sensible otherwise. Held-out phrasings are answered unevenly over relations: most of what it gets
wrong is in a few of them. Names are spelled without accents. It is not a source of facts: look them
up in the tables.
"""


if __name__ == "__main__":
    main()
