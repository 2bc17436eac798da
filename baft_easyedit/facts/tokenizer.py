"""A Llama-2 style BPE tokenizer for the fact model, trained on the model's own text.

Blanks become "▁" at the start of a word, unknown letters fall back to bytes, and `<s>` opens each
text. No merge crosses a blank or a punctuation mark, so the ids of a prompt are a prefix of those
of prompt + answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
NUM_BYTES = 256
MAX_LENGTH = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the tokenizer.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Number of tokens, with the three special and 256 byte tokens.

    Returns:
        The tokenizer; ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`.

    Raises:
        ValueError: If `vocab_size` has no room for the special tokens, bytes and letters.
    """
    words, merges = _learn_merges(texts, vocab_size - NUM_BYTES)
    specials = [UNK, BOS, EOS]
    byte_tokens = [f"<0x{value:02X}>" for value in range(NUM_BYTES)]
    tokens = [*specials, *byte_tokens, *words]
    if len(tokens) > vocab_size:
        raise ValueError(
            f"vocab_size must hold {len(tokens)} special tokens, bytes and letters, but got "
            f"{vocab_size}; raise it"
        )
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads."""
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
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _learn_merges(texts: Iterable[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn up to `size` tokens; returns letters and merged tokens by id, and the merges."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Punctuation(),  # "France?" must share its tokens with "France"
        ]
    )
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=size - 3, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return words, [(left, right) for left, right in model["merges"]]
