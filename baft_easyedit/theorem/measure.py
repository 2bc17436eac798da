"""Measure the theorem of `balls` on one fact: edits by ReFT and by BaFT, at one layer and position.

Both edit one state alone, that of the prompt's last token, which the theorem is about. So the
answer after an edit is that of the unedited model from the moved state on.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests, facts
from baft_easyedit.facts.tables import prompts_to_complete
from baft_easyedit.files.messages import short
from baft_easyedit.files.resources import REAL_MODEL, has_hparams, own_preset
from baft_easyedit.hparams import BaFTHyperParams, ReFTHyperParams
from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import (
    cache_name,
    decoder_layers,
    input_device,
    max_context,
    part_behind_cache,
)
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.theorem import balls

_NUM_IRRELEVANT = 12
"""Irrelevant prompts of a fact that is chosen here; half of them have the edited wording."""
_REACH = 4.0
"""How far radii are sought, as a share of the state's length."""
_NUM_RANDOM = 8
_NUM_ADVERSARIAL = 4
_ROUNDS = 8


@dataclass(frozen=True)
class Case:
    """A fact to edit, and the prompts whose states are measured."""

    prompt: str
    target: str
    rephrasings: Sequence[str] = ()
    irrelevant: Sequence[str] = ()  # prompts that should keep their answers, untold to the edits
    loc_prompts: Sequence[str] = ()  # irrelevant texts that BaFT learns to leave alone

    @classmethod
    def of_facts(cls, model: str) -> "Case":
        """Choose a fact that the model `smollm2` or `bundled` knows, with its prompts."""
        first, *others = edit_requests("known" if model == REAL_MODEL else "eval")
        asked, known = list(prompts_to_complete()), facts()
        own = next(a for a in asked if a.prompt == first["prompt"])
        told = tuple(first["loc_prompt"])
        alike = [  # the same words about other subjects
            a.prompt
            for a in asked
            if (known[a.case].relation, a.phrasing) == (known[own.case].relation, own.phrasing)
            and a.case != own.case
            and not any(text.startswith(a.prompt) for text in told)
        ]
        alike = alike[:: len(alike) // (_NUM_IRRELEVANT // 2)][: _NUM_IRRELEVANT // 2]
        probes = [probe["prompt"] for probe in first["locality"].values()]
        probes += [other["prompt"] for other in others[:_NUM_IRRELEVANT]]
        irrelevant = tuple(dict.fromkeys([*alike, *probes]))[:_NUM_IRRELEVANT]
        rephrasings = tuple(a.prompt for a in asked if a.case == own.case and a != own)
        return cls(own.prompt, first["target_new"], rephrasings, irrelevant, told)

    def prompts(self) -> list[tuple[str, str]]:
        """Return the kind and text of each measured prompt, the edited one first."""
        kinds = {"rephrasing": self.rephrasings, "irrelevant": self.irrelevant}
        others = [(kind, text) for kind, texts in kinds.items() for text in texts]
        return [("edited", self.prompt), *others]


@dataclass(frozen=True)
class Moved:
    """What one edit does to one state."""

    step: float  # |u(h)|
    least: float | None  # the length that the theorem demands of it; None for BaFT
    weight: float  # the mean basis weight, 1 for ReFT
    answer: str


@dataclass(frozen=True)
class State:
    """One prompt's state, and what the edits do to it. Lengths are in units of hidden states."""

    kind: str  # `edited`, `rephrasing` or `irrelevant`
    prompt: str
    answer: str  # the likeliest next token, before an edit
    length: float  # |h|
    distance: float  # from the edited prompt's state
    radius: float  # the shortest step that was found to change the answer
    random_radius: float  # the median of that in random directions
    edits: Mapping[str, Moved]  # by method

    def must_leave(self) -> bool:
        """Tell whether the theorem says that ReFT's edit leaves the stable ball."""
        return (self.edits["ReFT"].least or 0.0) >= self.radius

    def leaves(self, method: str) -> bool:
        """Tell whether a method's step is longer than the radius."""
        return self.edits[method].step >= self.radius

    def changes(self, method: str) -> bool:
        """Tell whether a method's edit changes the answer."""
        return self.edits[method].answer != self.answer


class LastState:
    """An unedited model as a function of the state of a prompt's last token at a layer's output."""

    def __init__(self, model: Any, ids: Sequence[int], layer: int) -> None:
        self._model = model
        self._layer = decoder_layers(model)[layer]
        self._tokens = torch.tensor([list(ids)], device=input_device(model))
        self._cache: Any = None
        with torch.no_grad(), self._at_output(None) as seen:
            if len(ids) > 1:
                output = model(input_ids=self._tokens[:, :-1], use_cache=True)
                self._cache = output[cache_name(model)]
            self._forward(1)
        self.hidden = seen[-1][0, -1].float()
        """The state h, [D]."""

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of the next token, [N, V], with other states [N, D] in its place."""
        with self._at_output(states):
            return self._forward(len(states)).float()

    def _forward(self, count: int) -> Tensor:
        """Run the last token `count` times behind the kept prefix; return logits [count, V]."""
        given: dict[str, Any] = {}
        if self._cache is not None:
            cache = copy.deepcopy(self._cache)  # a forward adds to its cache
            cache.batch_repeat_interleave(count)
            given[cache_name(self._model)] = cache
        model = part_behind_cache(self._model) if given else self._model
        return model(input_ids=self._tokens[:, -1:].expand(count, 1), **given).logits[:, -1]

    @contextmanager
    def _at_output(self, states: Tensor | None) -> Iterator[list[Tensor]]:
        """Collect the layer's outputs [N, T, D] in this context; put `states` into their place."""
        seen: list[Tensor] = []

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden, *more = output if isinstance(output, tuple) else (output,)
            seen.append(hidden)
            if states is None:
                return output
            hidden = states[:, None].to(hidden.dtype)
            return (hidden, *more) if isinstance(output, tuple) else hidden

        handle = self._layer.register_forward_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()


def settings(model: str, layer: int, device: int | str) -> list[BaFTHyperParams]:
    """Return hyper-parameters of ReFT and BaFT that edit the last prompt token at one layer.

    Beside that, they are those of the model's presets of the paper's form, but for more steps and a
    slower gate: with one edited position and four irrelevant texts, the presets' gate closes on the
    edit, too.
    """
    own: dict[str, Any] = {"layers": [layer], "num_prompt_positions": 1, "num_steps": 200}
    own |= {"model_name": model, "device": device}
    found: list[BaFTHyperParams] = []
    for kind, more in ((ReFTHyperParams, {}), (BaFTHyperParams, {"gate_lr": 1.0e-2})):
        name, given = f"{kind.algorithm}/{own_preset(model)}", {**own, **more}
        name = f"{name}-paper" if has_hparams(f"{name}-paper") else name
        found.append(kind.from_hparams(name, **given) if has_hparams(name) else kind(**given))
    return found


def measure(
    model: Any,
    tokenizer: Any,
    case: Case,
    hparams: Sequence[BaFTHyperParams],
    tell: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, float], list[State]]:
    """Edit a fact by each method, each time take the edit off again, and measure all states.

    `hparams` are the result of `settings`; `tell` is called with 1 after each state.

    Returns:
        sigma_max(H) of each method's A - R, and the states, the edited one first.

    Raises:
        ValueError: If a layer is beyond the model's depth, or a text cannot be edited.
    """
    prompt_format = PromptFormat.of(hparams[0])
    asked = _tokens(model, tokenizer, case, prompt_format)
    edits = {h.algorithm: _learned(model, tokenizer, case, h) for h in hparams}
    layer = next(iter(edits.values())).layers[0]
    learned = {name: edit.intervention(layer) for name, edit in edits.items()}
    states: list[State] = []
    edited = None
    for kind, prompt in case.prompts():
        found = LastState(model, asked[prompt], layer)
        edited = found.hidden if edited is None else edited
        states.append(_measured(found, edited, learned, (kind, prompt), tokenizer))
        tell(1)
    return {name: balls.sigma_max(edit) for name, edit in learned.items()}, states


def _tokens(
    model: Any, tokenizer: Any, case: Case, prompt_format: PromptFormat
) -> dict[str, tuple[int, ...]]:
    """Return the tokens of each prompt; raise ValueError for one beyond the model's context."""
    asked = {text: prompt_format.prompt_ids(text, tokenizer) for _, text in case.prompts()}
    context = max_context(model)
    for text, ids in asked.items():
        if context is not None and len(ids) > context:
            raise ValueError(
                f"a prompt must fit the model's context of {context} tokens; {short(text)} has "
                f"{len(ids)}: shorten it"
            )
    return asked


def _learned(model: Any, tokenizer: Any, case: Case, hparams: BaFTHyperParams) -> ModelEdit:
    """Learn the fact, take the edit off the model, and return it."""
    editor = BaFTEditor(model, tokenizer, hparams)
    request = {"prompt": case.prompt, "target_new": case.target}
    editor.edit({**request, "loc_prompt": list(case.loc_prompts)})
    editor.model_edit.detach()
    return editor.model_edit


def _measured(
    state: LastState,
    edited: Tensor,
    learned: Mapping[str, BaFTIntervention],
    named: tuple[str, str],
    tokenizer: Any,
) -> State:
    """Measure the radii of one state, and what each edit does to it."""
    h, length = state.hidden, state.hidden.norm().item()
    reach = _REACH * length
    toward = balls.adversarial_directions(state.logits, h, _NUM_ADVERSARIAL, _ROUNDS)
    at_random = balls.random_directions(h, _NUM_RANDOM, seed=0)
    found = balls.radii(state.logits, h, torch.cat([toward, at_random]), reach)
    distance = (h - edited).norm().item()
    with torch.no_grad():
        steps = {name: balls.step(edit, torch.stack([h, edited])) for name, edit in learned.items()}
        moved = torch.stack([h, *(h + step[0] for step in steps.values())])
        before, *after = tokenizer.batch_decode(state.logits(moved).argmax(-1)[:, None])
    edits = {}
    for (name, step), answer in zip(steps.items(), after, strict=True):
        own, at_edited = step.norm(dim=-1).tolist()
        least = balls.least_step(at_edited, balls.sigma_max(learned[name]), distance)
        weight = learned[name].gate(h).mean().item()
        edits[name] = Moved(own, least if name == "ReFT" else None, weight, answer)
    radius = found.min().item()
    at_random_radius = found[_NUM_ADVERSARIAL:].median().item()
    return State(*named, before, length, distance, radius, at_random_radius, edits)
