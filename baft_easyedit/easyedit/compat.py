"""What EasyEdit needs to run with current transformers and peft: repairs in memory, with reasons.

Nothing here concerns BaFT. Peers' defects that only show in comparisons are in `peers/repairs.py`.
"""

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def repair(generation: str) -> None:
    """Put right, in a generation of EasyEdit, what does not run with the installed libraries."""
    # peft >= 0.15 refuses an AdaLoRA without `total_step`, which only `update_and_allocate` reads;
    # EasyEdit never calls that.
    lora: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    lora.AdaLoraConfig = functools.partial(lora.AdaLoraConfig, total_step=1)
    if generation == "pypi":
        # The editor asks for `model_parallel`.
        hparams = importlib.import_module("easyeditor.models.lora.lora_hparams")
        hparams.LoRAHyperParams.model_parallel = False
        _repair_llama_classes()
        _repair_layer_outputs()
        _repair_scoring_limit()


def replace_everywhere(original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace a function in every EasyEdit module that holds it under its name."""
    name = original.__name__
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "easyeditor" and vars(module).get(name) is original:
            setattr(module, name, replacement)


def _repair_llama_classes() -> None:
    """Let the release load Llama models and tokenizers with the Auto classes.

    Its `LlamaTokenizer.from_pretrained` loses the spaces of a byte-level BPE tokenizer (Llama 3) in
    transformers 5, and cannot read a directory that has only a tokenizer.json before that. Its
    Llama branch is also the one for families that it does not know, so the model class is general.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

    class AnyTokenizer(type):
        def __instancecheck__(cls, instance: object) -> bool:  # asked before padding on the left
            return isinstance(instance, PreTrainedTokenizerBase)

    class LlamaTokenizer(metaclass=AnyTokenizer):
        from_pretrained = staticmethod(AutoTokenizer.from_pretrained)

    editor: Any = importlib.import_module("easyeditor.editors.editor")
    editor.LlamaTokenizer = LlamaTokenizer
    editor.LlamaForCausalLM = AutoModelForCausalLM


def _repair_layer_outputs() -> None:
    """Let the release trace decoder layers that return a tensor.

    MEMIT reads and changes `output[0]` of a decoder layer, which was a tuple in transformers 4.
    """
    nethook = importlib.import_module("easyeditor.util.nethook")
    init, close = nethook.Trace.__init__, nethook.Trace.close

    @functools.wraps(init)
    def traced(
        self: Any, module: nn.Module, layer: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self._tuple_hooks, was_tensor = [], False
        if layer is None or not layer.rpartition(".")[2].isdigit():  # not a decoder layer
            init(self, module, layer, *args, **kwargs)
            return

        def to_tuple(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            nonlocal was_tensor
            was_tensor = isinstance(output, Tensor)
            return (output,) if was_tensor else output

        def to_tensor(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            return output[0] if was_tensor else output

        target = nethook.get_module(module, layer)
        self._tuple_hooks.append(target.register_forward_hook(to_tuple))
        init(self, module, layer, *args, **kwargs)
        self._tuple_hooks.append(target.register_forward_hook(to_tensor))

    @functools.wraps(close)
    def closed(self: Any) -> None:
        close(self)
        for handle in self._tuple_hooks:
            handle.remove()

    nethook.Trace.__init__ = traced
    nethook.Trace.close = closed


def _repair_scoring_limit() -> None:
    """Let the release score whole texts, as the current EasyEdit does.

    It cuts prompt and target at `max_length` tokens: of a long one it scores a part of the target,
    or fails where nothing is left of it.
    """
    utils = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    original = utils.test_prediction_acc

    @functools.wraps(original)
    def score(
        model: Any, tok: Any, hparams: Any, prompts: Any, targets: Any, *args: Any, **kwargs: Any
    ) -> Any:
        texts = [[text] if isinstance(text, str) else text for text in (prompts, targets)]
        longest = max(len(tok.encode(f"{p} {t}")) for p, t in zip(*texts, strict=True))
        whole = copy.copy(hparams)
        whole.max_length = max(hparams.max_length, longest + 1)
        return original(model, tok, whole, prompts, targets, *args, **kwargs)

    replace_everywhere(original, score)


def usable_unknown_token(tok: Any) -> None:
    """Give a tokenizer without an unknown token one that never occurs in a target.

    The release's FT masks `target_ids != tok.unk_token_id`: no tensor where that is None.
    """
    if getattr(tok, "unk_token_id", 0) is None:
        tok.unk_token = tok.eos_token
