"""Load a causal language model by name, and let it answer prompts. Uses transformers."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from baft_easyedit.gguf.smollm2 import ready_location
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.batching import alike, padded
from baft_easyedit.model.devices import as_device, check_device
from baft_easyedit.model.inspect import dtype_option, max_context
from baft_easyedit.model.prompt_format import PromptFormat

logger = logging.getLogger(__name__)

PLAIN_DECODING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_dict_in_generate": False,
    **dict.fromkeys(
        (
            "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty",
            "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "max_time",
            "sequence_bias", "stop_strings", "suppress_tokens", "watermarking_config",
        )
    ),
}  # fmt: skip
"""Options of `generate` by which the model's scores alone decide, whatever its own settings are."""

_MAX_REASON = 200
"""Most characters to show of a message of transformers, which may be very long."""


def load_model(
    name: str, device: int | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a model in eval mode, and its tokenizer, with padding on the left.

    Args:
        name: Hugging Face name or directory; `bundled` for the model that comes with the package,
            `smollm2` for SmolLM2 (see `gguf.smollm2`).
        device: CUDA device number or device name.
        dtype: Dtype of the model's weights.

    Raises:
        OSError: If there is no such model, or its files are not those of a causal language model.
        ImportError: If the model is `smollm2`, and its package is not installed.
        ValueError: If the device is not on this machine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_device(device)
    with _located(name) as location:
        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(location, **dtype_option(dtype))
    if tokenizer.pad_token_id is None:  # any token will do, as padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.to(as_device(device)).eval(), tokenizer


def model_depth(name: str) -> int:
    """Return how many decoder layers a model has, without loading it.

    Raises:
        OSError: If there is no such model.
    """
    from transformers import AutoConfig

    with _located(name) as location:
        config = AutoConfig.from_pretrained(location)
    return int(config.get_text_config().num_hidden_layers)


@contextmanager
def _located(name: str) -> Iterator[str]:
    """Yield the directory or Hub name of a model; errors while it is loaded become an OSError.

    Raises:
        OSError: If a directory is missing or holds no model, or loading fails; in one line.
    """
    location = ready_location(name)
    path = Path(location)
    if path.exists() and not (path / "config.json").is_file():
        raise OSError(
            f"model must be a Hugging Face name or the directory of a model; {name!r} has no "
            "config.json"
        )
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise FileNotFoundError(
            f"model must be a Hugging Face name or the directory of a model; there is none at "
            f"{name!r}"
        )
    try:
        yield location
    # Damaged files make transformers, tokenizers and safetensors raise almost anything.
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:_MAX_REASON]
        raise OSError(
            f"model {name!r} could not be loaded ({type(error).__name__}: {first}): give the "
            "directory of a causal language model, or a Hugging Face name that can be reached"
        ) from error


def with_usable_end(hparams: BaFTHyperParams, tokenizer: Any) -> BaFTHyperParams:
    """Return hyper-parameters that a tokenizer allows: without `eos_token`, `learn_end` is off.

    A warning in the log says so.
    """
    if not hparams.learn_end or tokenizer.eos_token_id is not None:
        return hparams
    logger.warning("the tokenizer has no eos_token: where an answer ends is not learned")
    return replace(hparams, learn_end=False)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int | Sequence[int] = 12,
    device: torch.device | None = None,
    batch_size: int = 64,
    prompt_format: PromptFormat | None = None,
    top_k: int | None = None,
) -> list[str]:
    """Answer prompts by greedy decoding until the model ends each answer.

    Args:
        model: A causal language model, edited or not, or a wrapper of one with its `generate`.
        tokenizer: The model's; prompts are padded on the left, whatever its setting.
        prompts: Texts, or lists of token ids.
        max_new_tokens: Most tokens of an answer; one number for all prompts, or one for each. An
            answer ends before, where the model's context does.
        device: Device that the tokens are put on; the model's own `device` if None.
        batch_size: Most prompts decoded together; prompts in a batch have similar lengths.
        prompt_format: Format of prompts that are texts, usually `PromptFormat.of` the
            hyper-parameters that the edit was learned with; None for plain texts.
        top_k: If given, each token is drawn of so many of the likeliest, and no answer stops before
            it is cut.

    Returns:
        The new text after each prompt, stripped.

    Raises:
        ValueError: If a prompt leaves no room for an answer in the model's context.
    """
    given = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    prompt_format = prompt_format or PromptFormat()
    rows = [prompt_format.prompt_ids(p, tokenizer) if isinstance(p, str) else p for p in prompts]
    rooms = _rooms(model, rows)
    limits = [min(pair) for pair in zip(given, rooms, strict=True)]
    # Prompts of a batch share its largest limit, for which each must have room.
    kinds = [
        n.bit_length() if room >> n.bit_length() else -n
        for n, room in zip(limits, rooms, strict=True)
    ]
    answers: dict[int, str] = {}
    for group in alike([len(row) for row in rows], kinds):
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            longest = max(limits[i] for i in part)
            tokens = _continued(model, tokenizer, [rows[i] for i in part], longest, device, top_k)
            for i, new in zip(part, tokens, strict=True):
                text = tokenizer.decode(new[: limits[i]], skip_special_tokens=True)
                answers[i] = text.strip()
    return [answers[i] for i in range(len(prompts))]


def _rooms(model: Any, rows: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens have room behind each prompt in the model's context.

    Raises:
        ValueError: If a prompt fills the context: the model would answer nonsense.
    """
    most = max_context(model) or sys.maxsize
    longest = max(map(len, rows), default=0)
    if longest >= most:
        raise ValueError(
            f"a prompt must leave room in the model's context of {most} tokens; got {longest}"
        )
    return [most - len(row) for row in rows]


@torch.no_grad()
def _continued(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    num_tokens: int,
    device: torch.device | None,
    top_k: int | None,
) -> torch.Tensor:
    """Return the tokens generated after each prompt, [B, at most num_tokens]."""
    batch = padded(rows, tokenizer, "left")
    inputs = {name: tensor.to(device or model.device) for name, tensor in batch.items()}
    drawing = {
        "top_k": top_k,
        "top_p": 1.0,
        "min_p": None,
        "typical_p": 1.0,
        "temperature": 1.0,
        "min_new_tokens": num_tokens,
        "remove_invalid_values": True,  # of a model that edits broke
    }
    output = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=top_k is not None,
        **PLAIN_DECODING | (drawing if top_k is not None else {}),
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, inputs["input_ids"].shape[1] :]
