"""In which coordinates an edit is learned: what an optimiser moves, and how the edit follows.

The paper gives Phi (Eq. 3), not how it is parametrised; the same functions can be reached by other
steps. Named here are:

- `direct`: A, b, R and the gate, as they stand in Eq. 3. A turn of R moves what is edited by R h.
- `whitened` (ours): A - R = (A - R)_0 + V S and b = c - V S mu, where z = S (h - mu) are whitened
  states (see `whitening`); V is moved from 0, and c and R. A turn of R turns what was displaced,
  and nothing else. Of a gate with constants, the logits of each basis are moved in the same way:
  it opens to some states, and hardly to others. What a gate has beside them (the row of the
  subspace) is moved as it stands: what closes one irrelevant prompt so closes most.

Shapes: r rank, D hidden size; a leading E for independent edits.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from baft_easyedit.method.intervention import tangent
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.hooks import ModelEdit


class _Coordinates(Protocol):
    """Of some parameters of one layer."""

    moved: dict[str, Tensor]
    """What the optimiser moves in place of them, by the name of the parameter."""

    def pull_back(self) -> None:
        """Set the gradients of what is moved from those of the parameters."""

    def follow(self) -> None:
        """Set the parameters from what is moved."""

    def at(self, inputs: Tensor) -> Callable[[], Tensor]:
        """Return what computes the function from what is moved, [N, n], at fixed inputs [N, D]."""


class _Direct:
    """A and R in place of A - R and R."""

    def __init__(self, difference: Tensor, bias: Tensor, basis: Tensor, name: str) -> None:
        self._difference, self._bias, self._basis = difference, bias, basis
        self._source = (difference + basis).detach().requires_grad_()  # A
        self.moved = {name: self._source}

    def pull_back(self) -> None:
        self._source.grad = self._difference.grad
        if self._basis.grad is not None and self._difference.grad is not None:
            self._basis.grad = self._basis.grad - self._difference.grad

    def follow(self) -> None:
        self._difference.copy_(self._source - self._basis)

    def at(self, inputs: Tensor) -> Callable[[], Tensor]:
        return lambda: inputs @ (self._source - self._basis).mT + self._bias


class _Whitened:
    """V and c in place of the weight W_0 + V S and bias c - V S mu of an affine function.

    Args:
        weight: [..., n, D]; rows beyond the rank are moved as they stand.
        bias: [..., n].
        names: Of both.
        whitening: S and mu.
        rank: r.
        unit: What the function's input is divided by; V S is multiplied by it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        names: tuple[str, str],
        whitening: Whitening,
        rank: int,
        unit: Tensor | float = 1.0,
    ) -> None:
        self._weight, self._bias, self._whitening = weight, bias, whitening
        self._rank, self._unit = rank, unit
        self._start = weight.detach()[..., :rank, :].clone()
        rest = weight.detach()[..., rank:, :]
        self._rows = torch.cat([torch.zeros_like(self._start), rest], -2).requires_grad_()  # V
        self._constant = bias.detach().clone().requires_grad_()  # c
        self.moved = dict(zip(names, (self._rows, self._constant), strict=True))

    def pull_back(self) -> None:
        weight, bias = self._weight.grad, self._bias.grad
        if weight is None or bias is None:
            self._rows.grad = self._constant.grad = None
            return
        r = self._rank
        centred = self._unit * weight[..., :r, :] - bias[..., :r, None] * self._whitening.mean
        pulled = self._whitening.pulled(centred)
        self._rows.grad = torch.cat([pulled, weight[..., r:, :]], -2)
        self._constant.grad = bias

    def follow(self) -> None:
        r = self._rank
        change = self._whitening.folded(self._rows[..., :r, :])
        folded = self._start + self._unit * change
        self._weight.copy_(torch.cat([folded, self._rows[..., r:, :]], -2))
        self._bias.copy_(self._constant)
        self._bias[..., :r] -= change @ self._whitening.mean

    @torch.no_grad()
    def at(self, inputs: Tensor) -> Callable[[], Tensor]:
        r, rows = self._rank, self._rows
        before = inputs @ self._start.mT  # W_0 h
        whitened = self._whitening.whitened(self._unit * inputs)  # z
        return lambda: (
            torch.cat([before + whitened @ rows[:r].mT, inputs @ rows[r:].mT], -1) + self._constant
        )


class Coordinates:
    """What is moved in place of the parameters of an edit, or of E independent ones.

    Args:
        edit: The edit, from where it is.
    """

    def __init__(self, edit: ModelEdit) -> None:
        self._edit = edit
        self._parts: dict[str, _Coordinates] = {}  # by the name of a weight
        parameters = edit.learned_parameters()
        for layer in edit.layers:
            prefix = f"_interventions.{layer}."
            names = (f"{prefix}difference", f"{prefix}source_bias")
            difference, bias = (parameters[name] for name in names)
            if not edit.whitens:
                basis = parameters[f"{prefix}basis"]
                self._parts[names[0]] = _Direct(difference, bias, basis, names[0])
                continue
            whitening, rank = edit.whitening(layer), edit.rank
            self._parts[names[0]] = _Whitened(difference, bias, names, whitening, rank)
            names = (f"{prefix}gate.weight", f"{prefix}gate.bias")
            if names[1] in parameters:
                weight, bias = (parameters[name] for name in names)
                # A gate sees h / rms(h), which is near h / (rms of all).
                unit = whitening.rms
                self._parts[names[0]] = _Whitened(weight, bias, names, whitening, rank, unit)
        self.moved: Mapping[str, Tensor] = parameters | {
            name: value for part in self._parts.values() for name, value in part.moved.items()
        }
        """Leaves by the names of the parameters they stand for; others stand for themselves."""

    def displacement(self, layer: int, states: Tensor) -> Callable[[], Tensor]:
        """Return what computes Phi(h) - h of one layer from what is moved, [N, D].

        It needs no `pull_back` and no `follow`, and works out S (h - mu) once.

        Args:
            layer: Which.
            states: h, [N, D], fp32.
        """
        prefix, intervention = f"_interventions.{layer}.", self._edit.intervention(layer)
        step = self._parts[f"{prefix}difference"].at(states)
        gate, gate_part = intervention.gate, self._parts.get(f"{prefix}gate.weight")
        if gate_part is None:
            return lambda: (gate(states) * step()) @ intervention.basis
        logits = gate_part.at(gate.inputs(states))
        return lambda: (gate.activate(logits()) * step()) @ intervention.basis

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set the gradients of what is moved; that of R is the one along orthonormal matrices."""
        for part in self._parts.values():
            part.pull_back()
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Leave of the gradient of R what goes along orthonormal matrices."""
        for basis in self._edit.bases().values():
            if basis.grad is not None:
                # AdamW's kernel takes for granted that it lies in memory as the parameter does.
                basis.grad = tangent(basis.grad, basis).contiguous()

    @torch.no_grad()
    def follow(self) -> None:
        """Set the parameters from what was moved; the bases become orthonormal again."""
        self._edit.retract()
        for part in self._parts.values():
            part.follow()
