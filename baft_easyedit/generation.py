"""Load a causal language model by name, and let it answer prompts. Uses transformers."""

from collections.abc import Sequence
from typing import Any

import torch

from baft_easyedit.batching import alike, padded
from baft_easyedit.prompt_format import PromptFormat
from baft_easyedit.resources import model_location


def load_model(
    name: str, device: int | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a model in eval mode, and its tokenizer, with padding on the left.

    Args:
        name: Hugging Face name or directory; `bundled` for the model that comes with the package.
        device: CUDA device number or device name.
        dtype: Of the model's weights.

    Raises:
        OSError: If there is no such model; in some versions of transformers, ValueError.
    """
    import transformers
    from packaging.version import Version
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = model_location(name)
    tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    is_renamed = Version(transformers.__version__) >= Version("4.56")
    option = {"dtype" if is_renamed else "torch_dtype": dtype}
    model: Any = AutoModelForCausalLM.from_pretrained(location, **option)
    return model.to(device).eval(), tokenizer


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int | Sequence[int] = 12,
    device: torch.device | None = None,
    batch_size: int = 64,
    prompt_format: PromptFormat | None = None,
) -> list[str]:
    """Answer prompts by greedy decoding until the model stops by itself.

    Args:
        model: A causal language model, edited or not, or a wrapper of one with its `generate`.
        tokenizer: Its tokenizer; prompts are padded on the left, whatever its own side.
        prompts: One text per answer, or its tokens.
        max_new_tokens: Where an answer that does not stop is cut, in tokens; of all, or of each.
        device: Where the model wants its tokens; its own `device` if None.
        batch_size: Most prompts decoded together; those are of about one length.
        prompt_format: How texts are put to the model, `PromptFormat.of` the hyper-parameters that
            an edit was learned with; None for plain texts.

    Returns:
        The new text after each prompt, stripped.
    """
    given = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    limits = dict(enumerate(given))
    form = prompt_format or PromptFormat()
    rows = [form.prompt_ids(p, tokenizer) if isinstance(p, str) else p for p in prompts]
    answers: dict[int, str] = {}
    for group in alike(
        [len(row) for row in rows], [limit.bit_length() for limit in limits.values()]
    ):
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            longest = max(limits[i] for i in part)
            tokens = _continued(model, tokenizer, [rows[i] for i in part], longest, device)
            for i, new in zip(part, tokens, strict=True):
                text = tokenizer.decode(new[: limits[i]], skip_special_tokens=True)
                answers[i] = text.strip()
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def _continued(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    num_tokens: int,
    device: torch.device | None,
) -> torch.Tensor:
    """Return the new tokens after the tokens of each prompt, [B, at most num_tokens]."""
    batch = padded(rows, tokenizer, "left")
    inputs = {name: tensor.to(device or model.device) for name, tensor in batch.items()}
    output = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, inputs["input_ids"].shape[1] :]
