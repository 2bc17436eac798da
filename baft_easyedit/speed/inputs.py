"""Inputs of a speed run without real ones: models of random weights, requests of random words."""

import importlib
import random
import re
from typing import Any

import torch

from baft_easyedit.facts import edit_requests
from baft_easyedit.files.resources import bundled_model_path
from baft_easyedit.model.inspect import dtype_option

_HEAD_SIZE = 64
_LLAMA_3_8B = {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8}
_SHAPES: dict[str, dict[str, int]] = {"llama-2-7b": {}, "llama-3-8b": _LLAMA_3_8B, "gemma-7b": {}}
"""Sizes that differ from the defaults of the family's configuration in transformers."""
_ANSWER_LENGTH = 4
_NUM_FACTS = 100
"""Facts that random words are taken from."""
_MAX_TRIES = 200


def shape_sizes(shape: str) -> dict[str, int]:
    """Return the sizes of a shape that are not its family's defaults.

    Args:
        shape: `llama-2-7b`, `llama-3-8b`, `gemma-7b`, or `llama-<layers>x<width>`, a small Llama
            with 32,000 tokens and attention heads of size 64.

    Raises:
        ValueError: If there is no such shape, or the width is not a multiple of 64.
    """
    if shape in _SHAPES:
        return _SHAPES[shape]
    small = re.fullmatch(r"llama-([1-9]\d*)x([1-9]\d*)", shape)
    if small is None or int(small[2]) % _HEAD_SIZE:
        raise ValueError(
            f"shape must be one of {', '.join(_SHAPES)}, or llama-<layers>x<width> with a multiple "
            f"of {_HEAD_SIZE} as width, such as llama-12x512; got {shape!r}"
        )
    width = int(small[2])
    return {
        "num_hidden_layers": int(small[1]),
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // _HEAD_SIZE) * _HEAD_SIZE,
        "num_attention_heads": width // _HEAD_SIZE,
        "num_key_value_heads": width // _HEAD_SIZE,
    }


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Make a model with random weights, in eval mode; return it and the bundled model's tokenizer.

    Weights are made on the device and in the dtype, without an fp32 copy first. Torch's random
    state on the CPU stays as it was.
    """
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        bundled_model_path(), padding_side="left"
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = transformers.AutoConfig.for_model(
        shape.partition("-")[0],
        **shape_sizes(shape),
        **{name: getattr(tokenizer, name) for name in names},
        max_position_embeddings=8192,
    )
    with torch.random.fork_rng([]), device:
        torch.manual_seed(0)
        options = dtype_option(dtype)
        return transformers.AutoModelForCausalLM.from_config(config, **options).eval(), tokenizer


def random_requests(
    tokenizer: Any, prompt_length: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """Make requests of random words with EasyEdit's keys; the same ones for the same arguments.

    A prompt has `prompt_length` tokens, with those that begin a text; answers add four.

    Raises:
        ValueError: If no text of that length was found.
    """
    rng = random.Random(seed)
    words = sorted(
        {word for r in edit_requests("eval", _NUM_FACTS) for word in r["prompt"].split()}
    )

    def num_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    def longer(begin: str, length: int) -> str:
        """Add random words to a text until it has `length` tokens."""
        for _ in range(_MAX_TRIES):
            text = begin
            while num_tokens(text) < length:
                text = f"{text} {rng.choice(words)}".strip()
            if text != begin and num_tokens(text) == length:
                return text
        raise ValueError(
            f"prompt_length must be one that this tokenizer reaches with whole words; got {length} "
            "tokens in all: try a longer prompt"
        )

    requests = []
    for _ in range(count):
        prompt = longer("", prompt_length)
        end = num_tokens(prompt) + _ANSWER_LENGTH
        request = {key: longer(prompt, end) for key in ("target_new", "ground_truth")}
        answers = {key: text.removeprefix(prompt).strip() for key, text in request.items()}
        requests.append({"prompt": prompt, **answers, "subject": max(prompt.split(), key=len)})
    return requests
