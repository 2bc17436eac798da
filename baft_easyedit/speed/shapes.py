"""Models with random weights of known shapes, which are enough to measure speed, and a tokenizer.

Weights are made where they are used, in the dtype they are used in: no fp32 copy comes first.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import nn

_BEGIN, _END, _UNKNOWN = "<s>", "</s>", "<unk>"
_SPECIAL = (_BEGIN, _END, _UNKNOWN)
_HEAD_SIZE = 64
_LLAMA_2_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_LLAMA_3_8B = {
    **_LLAMA_2_7B,
    "vocab_size": 128_256,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_GEMMA_7B = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-2-7b": ("Llama", _LLAMA_2_7B),
    "llama-3-8b": ("Llama", _LLAMA_3_8B),
    "gemma-7b": ("Gemma", _GEMMA_7B),
}


@dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    name: str
    family: str
    """Of transformers' classes: `Llama` for `LlamaForCausalLM`."""
    sizes: Mapping[str, Any]
    """Arguments of the family's configuration."""

    def num_parameters(self) -> int:
        """Count the model's parameters, without making them."""
        with torch.device("meta"):
            model = self._make()
        return sum(p.numel() for p in model.parameters())

    def model(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
        """Make the model in eval mode; the global random state stays as it was.

        Args:
            device: Where the weights are made.
            dtype: Of the weights.
            seed: Seed of the weights.
        """
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda), _default_dtype(dtype), device:
            torch.manual_seed(seed)
            model = self._make()
        return model.eval()

    def _make(self) -> nn.Module:
        """Make the model by torch's defaults for device and dtype."""
        transformers: Any = importlib.import_module("transformers")
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # as in `word_tokenizer`
        config = getattr(transformers, f"{self.family}Config")(**self.sizes, **ids)
        return getattr(transformers, f"{self.family}ForCausalLM")(config)


def find_shape(name: str) -> Shape:
    """Return a shape by its name.

    Args:
        name: `llama-2-7b`, `llama-3-8b`, `gemma-7b`, or `llama-<layers>x<width>`, a small Llama
            with 32,000 tokens and attention heads of size 64.

    Raises:
        ValueError: If there is no such shape, or the width is not a multiple of 64.
    """
    if name in _SHAPES:
        return Shape(name, *_SHAPES[name])
    small = re.fullmatch(r"llama-([1-9]\d*)x([1-9]\d*)", name)
    if small is None or int(small[2]) % _HEAD_SIZE:
        raise ValueError(
            f"shape must be one of {', '.join(_SHAPES)}, or llama-<layers>x<width> with a multiple "
            f"of {_HEAD_SIZE} as width, such as llama-12x512; got {name!r}"
        )
    depth, width = int(small[1]), int(small[2])
    sizes = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // _HEAD_SIZE) * _HEAD_SIZE,
        "num_attention_heads": width // _HEAD_SIZE,
        "num_key_value_heads": width // _HEAD_SIZE,
    }
    return Shape(name, "Llama", {**_LLAMA_2_7B, **sizes})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new floating-point tensors of a dtype inside this context."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def word_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer for random weights: each token is a word of four letters.

    Texts begin with a special token; padding is on the left.

    Args:
        vocab_size: Number of tokens, the three special ones among them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers: Any = importlib.import_module("transformers")
    tokens = [*_SPECIAL, *(_word(i) for i in range(vocab_size - len(_SPECIAL)))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_END,
        unk_token=_UNKNOWN,
        padding_side="left",
    )


def _word(number: int) -> str:
    """Return the word of four letters with a number: no word is part of another one."""
    letters = ""
    for _ in range(4):
        number, digit = divmod(number, len(ascii_lowercase))
        letters = ascii_lowercase[digit] + letters
    return letters
