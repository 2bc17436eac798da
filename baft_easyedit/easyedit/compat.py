"""Repairs, in memory, that make EasyEdit run under current transformers and peft; with reasons.

`load_host` makes them after it has imported EasyEdit. Nothing here concerns BaFT. Defects of peers
(EasyEdit's other methods) that show only in comparisons are repaired in `peers/repairs.py`.
"""

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def repair(generation: str) -> None:
    """Repair those parts of an imported EasyEdit that do not run with the installed libraries."""
    # peft >= 0.15 refuses an AdaLoRA without `total_step`, which only `update_and_allocate` reads;
    # EasyEdit never calls that.
    lora: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    lora.AdaLoraConfig = functools.partial(lora.AdaLoraConfig, total_step=1)
    if generation == "pypi":
        # The editor reads `model_parallel`, which these hyper-parameters lack.
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
    transformers 5, and cannot read a directory that has only a tokenizer.json before that. Models
    of families that EasyEdit does not know are sent to its Llama branch too (`model_path`).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

    class AnyTokenizer(type):
        def __instancecheck__(cls, instance: object) -> bool:  # EasyEdit asks before it pads left
            return isinstance(instance, PreTrainedTokenizerBase)

    class LlamaTokenizer(metaclass=AnyTokenizer):
        from_pretrained = staticmethod(AutoTokenizer.from_pretrained)

    editor: Any = importlib.import_module("easyeditor.editors.editor")
    editor.LlamaTokenizer = LlamaTokenizer
    editor.LlamaForCausalLM = AutoModelForCausalLM


def _repair_layer_outputs() -> None:
    """Let the release trace decoder layers whose output is a tensor, as in transformers 5.

    MEMIT reads and changes `output[0]` of a decoder layer, whose output was a tuple before.
    """
    trace = importlib.import_module("easyeditor.util.nethook").Trace
    original = trace.__init__

    @functools.wraps(original)
    def init(self: Any, module: nn.Module, layer: str | None = None, *args: Any, **kw: Any) -> None:
        original(self, module, layer, *args, **kw)
        if layer is None or not layer.rpartition(".")[2].isdigit():  # not a decoder layer
            return
        handle = self.registered_hook
        hooks = handle.hooks_dict_ref()
        hook = hooks[handle.id]

        def with_tuple(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return hook(module, inputs, (output,))[0]
            return hook(module, inputs, output)

        hooks[handle.id] = with_tuple

    trace.__init__ = init


def _repair_scoring_limit() -> None:
    """Let the release score whole texts, as the current EasyEdit does.

    The release cuts prompt and target together at `max_length` tokens: of a long text it scores a
    part of the target, or fails if no token of the target is left.
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


class DeviceRemap(TorchFunctionMode):
    """Replace CUDA devices that do not exist in all calls to torch inside this context.

    The release writes `f"cuda:{device}"` everywhere. Without CUDA, the CPU replaces every one of
    them; with CUDA, only impossible names such as `cuda:cpu` lose their prefix.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_cuda = torch.cuda.is_available()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the device arguments of one call, then make it."""
        if func is torch.Tensor.cuda and not self.has_cuda:
            return args[0]
        # In `.to(0)` a bare number is a CUDA device; elsewhere it is only a number.
        is_move = func is torch.Tensor.to or getattr(func, "__name__", "") == "_parse_to"
        args = tuple(self._device(value, is_move) for value in args)
        options = dict(kwargs or {})
        if "device" in options:
            options["device"] = self._device(options["device"], True)
        return func(*args, **options)

    def _device(self, value: Any, number_is_device: bool) -> Any:
        """Return the device meant by one argument; anything else as it is."""
        if isinstance(value, str) and value.startswith("cuda:"):
            named = value.removeprefix("cuda:")
            value = value if named.isdigit() else named
        names_cuda = (
            (isinstance(value, str) and value.startswith("cuda"))
            or (isinstance(value, torch.device) and value.type == "cuda")
            or (number_is_device and type(value) is int)
        )
        return torch.device("cpu") if names_cuda and not self.has_cuda else value


def honoured_device(generation: str, device: Any) -> AbstractContextManager[Any]:
    """Return a context in which EasyEdit's code runs on `device`, that of its hyper-parameters."""
    if generation == "current" or (torch.cuda.is_available() and type(device) is int):
        return nullcontext()
    return DeviceRemap()
