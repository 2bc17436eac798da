"""Attach an edit to a Hugging Face causal language model by forward hooks, and take it off again.

When the model is called, a hook finds the positions to edit (see `positions`); then a hook of each
edited layer replaces the layer's output h by Phi(h) there. The model's modules, parameter names and
weights stay untouched. A `ModelEdit` owns all learned tensors; its hooks are bound methods, so
`copy.deepcopy(model)` copies the edit with the model.

Shapes: B batch, T tokens of a forward, D hidden size, r rank.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from baft_easyedit.model.contexts import Contexts, GateRecord
from baft_easyedit.model.edit import EditParameters
from baft_easyedit.model.inspect import check_layers, computing_device, decoder_layers, owner_of
from baft_easyedit.model.locks import ModelLock, lock_of
from baft_easyedit.model.overrides import Override, override
from baft_easyedit.model.positions import PromptLengths, positions_of_call, says_nothing_of_prompts
from baft_easyedit.model.repeats import Repeatable

logger = logging.getLogger(__name__)

_UNTOLD = (
    "A forward pass of an edited model does not say where its prompts end: each row is taken as a "
    "prompt, and only its last %d tokens are edited. If answers are in it (log-likelihoods, "
    "perplexity), they are scored almost without the edit: use `with "
    "model_edit.prompt_lengths([...])`, with the number of tokens of each prompt, or pass labels. "
    "(This is said once for each edit.)"
)

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from torch.compile, as dynamo cannot trace thread-local state.

    `torch.compiler.disable` does so, but imports dynamo, which takes about a second; so it is
    applied at the function's first call only.
    """

    @cache
    def disabled() -> Callable[P, R]:
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return disabled()(*args, **kwargs)

    return call


class _Calls(threading.local):
    """A thread's present forward pass."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        """True where the intervention applies, [B, T]."""
        self.begun_by: int | None = None
        """Id of the module whose call began the forward pass; None between forward passes."""
        self.is_announced = False
        """Whether the model was called, but has not called its inner decoder yet."""
        self.may_be_repeated = False
        """Whether a backward pass may repeat layers of it, as gradient checkpointing does."""

    def __reduce__(self) -> Any:
        return _Calls, ()


class ModelEdit(EditParameters):
    """An edit that can be attached to a model by forward hooks, and taken off again.

    Args:
        *shape: See `EditParameters`.
        **options: See `EditParameters`.
    """

    def __init__(self, *shape: Any, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.caches: dict[type, Any] = {}
        """Caches of training (captured steps), by type; all can be made again."""
        self.handles: list[RemovableHandle | Override] = []
        """Handles of the hooks and of the overridden methods; empty unless attached."""
        self.contexts = Contexts()
        """What the present thread or task set by the contexts below."""
        self._lock: ModelLock | None = None
        self._beside: tuple[ModelEdit, ...] = ()
        self._calls = _Calls()
        # Of all threads: autograd's own repeat layers that another thread called.
        self._repeatable = Repeatable()
        self._has_warned = False

    def attach(self, model: nn.Module) -> None:
        """Make `model` use this edit in every forward pass from now on.

        The edit does not reach saved or exported weights (`save_pretrained` writes those of the
        unedited model), engines with their own forward (vLLM, TGI), and code that torch.compile
        made of the model before, until `torch.compiler.reset()`. PEFT's forward hides labels from a
        model that was edited before PEFT wrapped it: attach to PEFT's model, or give
        `prompt_lengths`. Forwards may run side by side in threads; a context of this class
        (`disabled`, `prompt_lengths`, `recording`) holds for its thread or asyncio task.

        Raises:
            ValueError: If this edit is attached already, `model` carries another edit, or an edited
                layer does not exist in it.
        """
        with lock_of(model).changing():
            stack = decoder_layers(model)
            check_layers(self.layers, len(stack))
            if self.handles:
                raise ValueError("this edit is already attached to a model: call detach() first")
            if attached_edit(model) not in (None, *self._beside):
                raise ValueError("the model already carries an edit: detach or undo that one first")
            try:
                self._hook_into(model, stack)
            except BaseException:
                self.unhook()
                raise

    def _hook_into(self, model: nn.Module, stack: nn.ModuleList) -> None:
        """Register the hooks; the first is the one by which `attached_edit` finds the edit."""
        self._calls, self._repeatable, self._lock = _Calls(), Repeatable(), lock_of(model)
        add = self.handles.append
        add(model.register_forward_pre_hook(self._on_model_call, with_kwargs=True))
        add(model.register_forward_hook(self._on_return, always_call=True))
        owner = owner_of(model, stack)
        if owner is not model:
            add(owner.register_forward_pre_hook(self._on_decoder_call, with_kwargs=True))
            add(owner.register_forward_hook(self._on_return, always_call=True))
            self.handles += override(self, model)
        for i in self.layers:
            add(stack[i].register_forward_hook(partial(self._on_layer, i), prepend=True))

    def detach(self) -> None:
        """Take this edit off its model, which then computes exactly what it did before.

        The caches are cleared.
        """
        with nullcontext() if self._lock is None else self._lock.changing():
            self.unhook()
            self.forget()

    def unhook(self) -> None:
        """Remove all hooks, even if an interrupt comes in between; the caches stay."""
        with ExitStack() as hooks:
            hooks.callback(self.handles.clear)
            for handle in self.handles:
                hooks.callback(handle.remove)

    def forget(self) -> None:
        """Clear the caches and the gradients."""
        self.caches.clear()
        self.zero_grad()

    def follow(self, model: nn.Module) -> None:
        """Move each layer's tensors to the device where that layer of the model computes."""
        stack = decoder_layers(model)
        for i in self.layers:
            device = computing_device(stack[i])
            if device.type != "meta":  # weights that are loaded later
                self.move(i, device)

    @property
    def is_named(self) -> bool:
        """Whether this is one of several edits of its model, each off outside `switched`."""
        return not self.contexts.is_on

    def share(self, others: Iterable["ModelEdit"]) -> None:
        """Allow other edits on the same model, and be off in all threads outside `switched`."""
        self._beside, self.contexts = tuple(others), Contexts(is_on=False)

    def disabled(self) -> AbstractContextManager[None]:
        """Run the model without the edit inside this context."""
        return self.switched(False)

    def switched(self, is_on: bool) -> AbstractContextManager[None]:
        """Run the model with or without the edit inside this context."""
        return self.contexts.within(enabled=is_on)

    def prompt_lengths(self, lengths: PromptLengths | None) -> AbstractContextManager[None]:
        """Tell the forward passes inside this context where the prompts end.

        Args:
            lengths: Real (not padding) prompt tokens of each row; None for "not known".
        """
        return self.contexts.within(prompt_lengths=lengths)

    def generating(
        self, prompt_width: int | None, num_virtual: int = 0
    ) -> AbstractContextManager[None]:
        """Treat the forward passes inside this context as one generation.

        Args:
            prompt_width: Columns of its prompts, padding included; None for "not known".
            num_virtual: Virtual tokens that PEFT puts before each prompt, or into its cache.
        """
        outer = self.contexts.now  # whose width is known where `generate` runs inside `generate`
        if outer.prompt_width is not None or prompt_width is None:
            return self.contexts.within()
        return self.contexts.within(prompt_width=prompt_width, num_virtual=num_virtual)

    def at_positions(self, positions: Tensor) -> AbstractContextManager[None]:
        """Let the forward passes inside this context intervene where `positions` [B, T] is True."""
        return self.contexts.within(given_positions=positions)

    def learning(self) -> AbstractContextManager[None]:
        """Run the model with the interventions that are learned alone, without past edits."""
        return self.contexts.within(is_learning=True)

    @contextmanager
    def recording(self) -> Iterator[GateRecord]:
        """Record the basis weights of the forward passes inside this context."""
        record = GateRecord()
        with self.contexts.within(record=record):
            yield record

    @not_compiled
    def _on_model_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Forward pre-hook of the model: find the positions before the layers run.

        `kwargs` are missing in a call that began while another thread attached or detached.
        """
        if kwargs is None:
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "an edited model cannot run in nn.DataParallel, whose copies share one edit: use "
                "one process for each device, or accelerate's device_map"
            )
        self._begin_call(model, args, kwargs)
        self._calls.is_announced = True

    @not_compiled
    def _on_decoder_call(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Forward pre-hook of the inner decoder, which PEFT and users call without the model."""
        if kwargs is None:
            return
        if not self._calls.is_announced:
            self._begin_call(decoder, args, kwargs)
        self._calls.is_announced = False

    def _begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait for a change by another thread; then find the positions of a forward pass."""
        if self._lock is not None and not torch.compiler.is_compiling():
            self._lock.begin_forward()
            if not self.handles:  # detached meanwhile, so `_on_return` will not be called
                self._lock.end_forward()
        contexts, calls = self.contexts.now, self._calls
        calls.begun_by, calls.may_be_repeated = id(module), torch.is_grad_enabled()
        self._repeatable.forget_freed()
        calls.positions = contexts.given_positions
        if calls.positions is None and contexts.enabled:
            calls.positions = self._positions_of(module.forward, args, kwargs)

    def _positions_of(
        self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Read the positions of a forward pass from its arguments and this thread's contexts."""
        now, num = self.contexts.now, self.num_prompt_positions
        lengths, width = now.prompt_lengths, now.prompt_width
        if now.num_virtual:
            lengths = None if lengths is None else torch.as_tensor(lengths) + now.num_virtual
            width = None if width is None else width + now.num_virtual
        may_warn = not self._has_warned and not torch.compiler.is_compiling()
        if lengths is None and width is None and may_warn:
            self._has_warned = says_nothing_of_prompts(forward, args, kwargs, num)
            if self._has_warned:
                logger.warning(_UNTOLD, num)
        return positions_of_call(forward, args, kwargs, num, lengths, width)

    @not_compiled
    def _on_return(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook of the model or decoder; it runs also if the forward raised."""
        calls = self._calls
        if calls.begun_by == id(module):
            calls.begun_by, calls.positions = None, None
            calls.is_announced, calls.may_be_repeated = False, False
            if self._lock is not None and not torch.compiler.is_compiling():
                self._lock.end_forward()

    def _on_layer(self, layer: int, _module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a decoder layer, which returns hidden states or a tuple of them first."""
        if isinstance(output, tuple):
            return (self._edited(layer, args, output[0]), *output[1:])
        return self._edited(layer, args, output)

    def _positions_at(self, layer: int, args: tuple[Any, ...]) -> Tensor | None:
        """Return where a layer is edited: nowhere if it is called alone, without its model.

        A layer that a backward pass repeats is edited as it was in its forward pass.

        Raises:
            RuntimeError: If a layer is repeated on another input than that of one forward pass.
        """
        calls = self._calls
        if torch._C._current_graph_task_id() != -1:
            known = self._repeatable.of(args)
            if len(known) == 1:
                return known[0]
            if calls.begun_by is None:
                raise RuntimeError(
                    f"a backward pass repeats layer {layer} (gradient checkpointing), but its "
                    f"input is that of {len(known)} forward passes, so where it was edited is not "
                    "known: checkpoint one layer at a time, keep its input where it is (without "
                    "offloading), and give each call inputs_embeds of its own"
                )
        positions = calls.positions if self.contexts.now.enabled else None
        if calls.may_be_repeated:
            self._repeatable.remember(args, positions)
        return positions

    @not_compiled
    def _edited(self, layer: int, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Edit the output [B, T, D] of one layer; other positions stay bit-equal."""
        at, contexts = self._positions_at(layer, args), self.contexts.now
        if at is None or hidden.is_meta:
            return hidden
        if at.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"layer {layer} returned hidden states of shape {tuple(hidden.shape)}, but the "
                f"model was called on {tuple(at.shape)} tokens"
            )
        self.move(layer, hidden.device)
        here = at.to(hidden.device)
        if self.min_similarity is not None and not contexts.is_learning:
            edited, weights = hidden.clone(), hidden.new_zeros(*here.shape, self.rank).float()
            edited[here], weights[here] = self.act(layer, hidden[here])
        else:
            # Padding can hold NaN, whose gradient `where` alone would not stop.
            edited, weights = self._intervene(layer, torch.where(here[..., None], hidden, 0))
            edited = torch.where(here[..., None], edited, hidden)
        if contexts.record is not None:
            contexts.record.positions = at
            contexts.record.weights[layer] = weights
            contexts.record.hidden[layer] = hidden.detach()
        return edited

    def _intervene(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return edited hidden states [B, T, D] and their basis weights [B, T, r]."""
        edited: tuple[Tensor, Tensor] = self.intervention(layer)(hidden)
        return edited

    def move(self, layer: int, device: torch.device) -> None:
        """Move a layer's learned tensors to the device where the layer computes now."""
        if self.intervention(layer).source_bias.device != device:
            with torch.inference_mode(False):  # whose tensors could not be learned
                for parts in (self._interventions, self._usage, self._whitening, self._past):
                    if str(layer) in parts:
                        parts[str(layer)].to(device)


def attached_edit(model: object) -> ModelEdit | None:
    """Return the edit attached to a model (or to a model inside it, such as PEFT's), if any.

    Of named edits it is the last one.
    """
    return next(_attached_edits(model), None)


def _attached_edits(model: object) -> Iterator[ModelEdit]:
    """Yield the edits attached to a model: one, or several named ones."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, ModelEdit):
                yield owner


@contextmanager
def with_prompt_lengths(model: object, lengths: PromptLengths) -> Iterator[None]:
    """Tell the edits that a model carries where prompts end: `ModelEdit.prompt_lengths` of each."""
    with ExitStack() as told:
        for edit in dict.fromkeys(_attached_edits(model)):
            told.enter_context(edit.prompt_lengths(lengths))
        yield
