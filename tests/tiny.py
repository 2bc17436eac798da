"""A tiny random Llama on disk, for checks that need a model and nothing that it knows."""

import importlib
from pathlib import Path
from typing import Any

import torch

HIDDEN_SIZE, DEPTH = 48, 4
_BEGIN, _END = "<s>", "</s>"


def save_tiny_llama(directory: Path, seed: int = 0) -> Path:
    """Save a random Llama of width 48 and 4 layers with a byte tokenizer, made here.

    Args:
        directory: Where the directory `tiny-llama` goes; EasyEdit reads classes from a path, so no
            part of it should name another model family (`model_path.host_model_path` helps).
        seed: Seed of the weights; the global random state stays as it was.

    Returns:
        The model's directory.
    """
    transformers: Any = importlib.import_module("transformers")
    target = directory / "tiny-llama"
    tokenizer = _byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        # At the usual scale of 0.02 layers this small are nearly the identity.
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 2 and "embed" not in name:
                    p.mul_(40 if "lm_head" in name else 5)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _byte_tokenizer() -> Any:
    """Return a byte-level tokenizer without merges that begins texts with a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    transformers: Any = importlib.import_module("transformers")
    tokens = [_BEGIN, _END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_END,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds types of tokens
    )
