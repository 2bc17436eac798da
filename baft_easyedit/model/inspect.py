"""Find the decoder layers, cache argument and devices of a Hugging Face causal language model.

Needs torch only.
"""

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")
"""Names of a forward's key-value cache argument: since transformers 5.24, and before."""


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return `from_pretrained`'s option for the weights' dtype, renamed in transformers 4.56."""
    import transformers
    from packaging.version import Version

    is_renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if is_renamed else "torch_dtype": dtype}


def max_context(model: Any) -> int | None:
    """Return how many tokens a model takes at most; None if its configuration does not say.

    A wrapper of a model may have no configuration, or one of its own kind: it does not say.
    """
    has_config = getattr(model, "config", None) is not None
    return getattr(text_config(model), "max_position_embeddings", None) if has_config else None


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text decoder.

    Raises:
        ValueError: If the model has no Hugging Face configuration.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"model must be a Hugging Face causal language model; {type(model).__name__} has no "
            "config"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of decoder layers of a causal language model.

    Of the `ModuleList`s with `num_hidden_layers` entries, the stack is the one nearest to the input
    embeddings (the tower of another modality may be as deep), and of those the least nested.

    Raises:
        ValueError: If there is none, or the model is an encoder-decoder, recurrent, bidirectional,
            without a language model's head, has several hidden states for each token (Gemma 3n), or
            puts virtual tokens before its prompts.
    """
    config = text_config(model)
    name = type(model).__name__
    _check_prompts(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder-only language model; {name} has an encoder")
    depth = getattr(config, "num_hidden_layers", None)
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if not stacks:
        raise ValueError(
            f"model has no recognisable decoder stack: {name} holds no ModuleList of "
            f"config.num_hidden_layers = {depth} layers"
        )
    embeddings = _path_of(cast(Any, model).get_input_embeddings(), model)
    path = min(stacks, key=lambda path: (-_num_shared(path, embeddings), path.count(".")))
    _check_cache(model, stacks[path])
    _check_answers(model, stacks[path])
    return stacks[path]


def _check_cache(model: nn.Module, stack: nn.ModuleList) -> None:
    """Raise ValueError unless a model tells by a key-value cache which tokens came before."""
    if not _cache_names(model, stack):
        raise ValueError(
            "model must take a key-value cache, by which an edit tells later tokens from prompts; "
            f"{type(model).__name__} takes none (recurrent models keep a state instead): use a "
            "decoder-only transformer"
        )


def _path_of(module: nn.Module, model: nn.Module) -> str:
    """Return the name of a module inside a model."""
    return next((path for path, m in model.named_modules() if m is module), "")


def _num_shared(path: str, other: str) -> int:
    """Return how many modules two paths have in common from the model on."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _check_prompts(model: Any) -> None:
    """Raise ValueError if a model is PEFT's, and puts virtual tokens before those of its call."""
    kind: Any = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    # Prefix tuning, and a cartridge, put them into the cache.
    if num_virtual_tokens(model) and kind not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            "model must be called on the tokens that its decoder sees; got a PEFT model that puts "
            f"virtual ones before them (peft_type {kind.value}): attach the edit to the model "
            "inside it, or use prefix tuning or LoRA"
        )


def num_virtual_tokens(model: Any) -> int:
    """Return how many tokens PEFT's prompt learning puts before a prompt; 0 for other models."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def _check_answers(model: nn.Module, stack: nn.ModuleList) -> None:
    """Raise ValueError unless a model generates, left to right, with one state for each token."""
    wrong = {
        "which cannot generate": generating_part(model) is None,
        "whose layers attend to later tokens": getattr(stack[0], "is_decoder", True) is False,
        "whose layers return several states for each token": hasattr(stack[0], "altup"),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(
                "model must be a causal language model with its head and one hidden state for each "
                f"token; got {type(model).__name__}, {what}: load another by AutoModelForCausalLM"
            )


def generating_part(model: nn.Module) -> nn.Module | None:
    """Return the model inside `model` that generates by itself, or None; PEFT wraps it."""
    for module in model.modules():
        can_generate = getattr(type(module), "can_generate", None)
        if can_generate is not None and can_generate():
            return module
    return None


def part_behind_cache(model: nn.Module) -> nn.Module:
    """Return the module inside `model` to call behind a cache; PEFT's would put in one of its own.

    The first tokens are read by `model` itself: the virtual ones of prefix tuning are then in the
    cache.
    """
    return generating_part(model) or model


def owner_of(model: nn.Module, stack: nn.ModuleList) -> nn.Module:
    """Return the module inside a model whose child is the decoder stack."""
    return next(m for m in model.modules() if any(child is stack for child in m.children()))


def cache_name(model: nn.Module) -> str:
    """Return the name of the key-value cache in a model's forward and output."""
    return _cache_names(model, decoder_layers(model))[0]


def _cache_names(model: nn.Module, stack: nn.ModuleList) -> list[str]:
    """Return the names by which a model's forward, then its decoder's, takes a cache.

    PEFT's forward passes its arguments on without naming them, so the decoder's is asked too.
    """
    taken = [*inspect.signature(model.forward).parameters]
    taken += inspect.signature(owner_of(model, stack).forward).parameters
    return [name for name in taken if name in CACHE_NAMES]


def repeated_cache(cache: Any, count: int) -> Any:
    """Return a key-value cache of one text for `count` of them; None if it cannot be repeated."""
    if not hasattr(cache, "reorder_cache"):
        return None
    cache.reorder_cache(torch.zeros(count, dtype=torch.long))
    return cache


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes tokens, even if accelerate offloads weights."""
    return computing_device(cast(Any, model).get_input_embeddings())


def computing_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, even if accelerate offloads its weights."""
    for part in module.modules():
        execution = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    return next(module.parameters()).device


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise ValueError unless all `layers` exist in a model of `depth` decoder layers."""
    beyond = [i for i in layers if i >= depth]
    if beyond:
        raise ValueError(
            f"layers must be below {depth}, the depth of this model (0-based); got {beyond[0]}"
        )


def last_logits(model: nn.Module) -> dict[str, int]:
    """Return the argument that spares the logits of all positions but the last, if there is one."""
    name = "logits_to_keep"
    return {name: 1} if name in inspect.signature(model.forward).parameters else {}


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a layer's output; older transformers return tuples."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
