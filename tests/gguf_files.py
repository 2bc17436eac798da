"""Small GGUF files, written as llama.cpp's converter writes them."""

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
SPECIAL = ["<|unk|>", "<|user|>", "<|end|>", "<|pad|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 7", "Ġ a", "a b"]
TOKENS = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
TOKENIZER = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "padding_token_id": 3,
    "add_bos_token": False,
}
REAL_SIZES = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024, "n_inner": None}}
"""What transformers' reader takes for granted, for all files of these families have it."""


def make_tiny(family):
    config_class, sizes = FAMILIES[family]
    sizes = {**sizes, **REAL_SIZES.get(family, {}), "vocab_size": len(TOKENS)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**sizes)).eval()


def write_gguf(file, family="llama", tokenizer=None, quantised=None, more=None, drop=None):
    """Write a tiny random model, and return it.

    Args:
        file: Where.
        family: Of `tests.conftest.FAMILIES`.
        tokenizer: Values that replace those of `TOKENIZER`; None takes one out.
        quantised: Name of a quantisation, of which one tensor is.
        more: Other metadata, and tensors, that are added.
        drop: Name of a tensor to leave out.
    """
    import gguf

    model = make_tiny(family)
    writer = gguf.GGUFWriter(str(file), family)
    config = model.config.get_text_config()
    _write_sizes(writer, config)
    for name, value in ({**TOKENIZER, **(tokenizer or {})}).items():
        if value is not None:
            _add(writer, f"tokenizer.ggml.{name}", value)
    writer.add_chat_template(TEMPLATE)
    for name, value in (more or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            _add(writer, name, value)
    _write_tensors(writer, model, config, family, quantised, drop)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _write_sizes(writer, config):
    writer.add_name("tiny")
    writer.add_context_length(getattr(config, "max_position_embeddings", 512))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_feed_forward_length(4 * config.hidden_size)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _write_tensors(writer, model, config, arch, quantised, drop):
    import gguf

    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, p in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        target = names.get_name(stem)
        values = p.detach().float()
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            values = permuted(values, heads)
        if arch == "gpt2" and stem.endswith(("c_attn", "c_proj", "c_fc")) and suffix == "weight":
            values = values.T
        if arch == "gemma3" and "norm" in stem:
            values = values + 1
        if target is None or f"{target}.{suffix}" == drop:
            assert target is not None
            continue
        values = values.contiguous().numpy()
        if quantised and stem.endswith("layers.0.mlp.up_proj"):
            its = gguf.GGMLQuantizationType[quantised]
            values = gguf.quants.quantize(values, its)
            writer.add_tensor(f"{target}.{suffix}", values, raw_dtype=its)
        else:
            writer.add_tensor(f"{target}.{suffix}", values)


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Order rows as llama.cpp's rotary embedding has them."""
    rows = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, rows, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
