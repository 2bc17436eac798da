"""What EasyEdit needs to run with current transformers and peft: repairs in memory, with reasons.

Nothing here concerns BaFT. Peers' defects that only show in comparisons are in `peer_fixes.py`.
"""

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

_MOVED_NAMES = (
    "apply_chunking_to_forward",
    "find_pruneable_heads_and_indices",
    "prune_linear_layer",
)


@contextmanager
def moved_names() -> Iterator[None]:
    """Let `transformers.modeling_utils` have, in this context, names that version 5 took from it.

    The release of EasyEdit imports them for its vision models. They moved to
    `transformers.pytorch_utils`, or are gone.
    """
    from transformers import modeling_utils, pytorch_utils

    added = [name for name in _MOVED_NAMES if not hasattr(modeling_utils, name)]
    for name in added:
        setattr(modeling_utils, name, getattr(pytorch_utils, name, _gone(name)))
    try:
        yield
    finally:
        for name in added:
            delattr(modeling_utils, name)


def _gone(name: str) -> Callable[..., NoReturn]:
    """Make a function that says that transformers no longer has it."""

    def unavailable(*args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001
        raise ImportError(
            f"transformers.modeling_utils.{name} is gone from the installed transformers. EasyEdit "
            "uses it in its multimodal editors; text editing never needs it."
        )

    return unavailable


def repair(generation: str) -> None:
    """Put right what does not run with the installed transformers and peft.

    Args:
        generation: EasyEdit's generation.
    """
    _repair_adalora()
    if generation == "pypi":
        _repair_llama_classes()
        _repair_lora_hparams()
        _repair_layer_outputs()
        _repair_scoring_limit()


def _repair_adalora() -> None:
    """Give AdaLoRA the `total_step` without which peft >= 0.15 refuses its configuration.

    EasyEdit never calls `update_and_allocate`, the only reader of that number.
    """
    module: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    module.AdaLoraConfig = functools.partial(module.AdaLoraConfig, total_step=1)


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


def _repair_lora_hparams() -> None:
    """Give LoRA's hyper-parameters the `model_parallel` that the release's editor asks for."""
    module = importlib.import_module("easyeditor.models.lora.lora_hparams")
    module.LoRAHyperParams.model_parallel = False


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
        self._tuple_hooks = []
        if layer is None or not layer.rpartition(".")[2].isdigit():  # not a decoder layer
            init(self, module, layer, *args, **kwargs)
            return
        target = nethook.get_module(module, layer)
        shape = _OutputShape()
        self._tuple_hooks.append(target.register_forward_hook(shape.to_tuple))
        init(self, module, layer, *args, **kwargs)
        self._tuple_hooks.append(target.register_forward_hook(shape.to_tensor))

    @functools.wraps(close)
    def closed(self: Any) -> None:
        close(self)
        for handle in self._tuple_hooks:
            handle.remove()

    nethook.Trace.__init__ = traced
    nethook.Trace.close = closed


class _OutputShape:
    """A pair of forward hooks: tensor outputs are tuples for the hooks between the two."""

    def __init__(self) -> None:
        self.was_tensor = False

    def to_tuple(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        self.was_tensor = isinstance(output, Tensor)
        return (output,) if self.was_tensor else output

    def to_tensor(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        return output[0] if self.was_tensor else output


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

    for name, module in list(sys.modules.items()):
        if name.startswith("easyeditor.") and vars(module).get(score.__name__) is original:
            setattr(module, score.__name__, score)


def usable_unknown_token(tok: Any) -> None:
    """Give a tokenizer without an unknown token one that never occurs in a target.

    The release's FT masks `target_ids != tok.unk_token_id`: no tensor where that is None.
    """
    if getattr(tok, "unk_token_id", 0) is None:
        tok.unk_token = tok.eos_token
