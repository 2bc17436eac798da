"""Coordinates of training: the leaf tensors that the optimiser moves in place of the parameters.

The paper gives the function Phi (Eq. 3), not its parametrisation, but the parametrisation decides
which function an optimiser step leads to. There are two:

- `direct`: the leaves are A, b, R and the gate of Eq. 3. If R turns by dR, the step A h + b - R h
  changes by -dR h at every state.
- `whitened` (ours): the leaves are V (which begins at 0), c and R, and the step at h is
  (A - R)_0 h + V z + c, where z = S (h - mu) is the whitened state (see `whitening`). S and mu are
  folded into the parameters: A - R = (A - R)_0 + V S and b = c - V S mu. If R turns,
  displacements turn with it, but no others arise. The logits of a gate with biases are trained
  in the same way, one row of V for each basis: a gate can open to some states and hardly to others.
  The gate's other row (the weight of the whole subspace) is trained directly: closing it on one
  irrelevant prompt closes it on most.

A training step computes the gradients of the parameters; `Coordinates.pull_back` turns them into
those of the leaves, the optimiser moves the leaves, and `Coordinates.follow` sets the parameters.

Shapes: r rank, D hidden size; a leading E for independent edits.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from baft_easyedit.method.intervention import tangent
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.hooks import ModelEdit


class _Coordinates(Protocol):
    """Leaves for an affine function at one layer: the step A h + b - R h, or the gate's logits."""

    moved: dict[str, Tensor]
    """The leaves that the optimiser moves, by the name of the parameter that they replace."""

    def pull_back(self) -> None:
        """Set the gradients of the leaves from those of the parameters (chain rule)."""

    def follow(self) -> None:
        """Set the parameters from the leaves."""


class _Direct:
    """The leaf A in place of the parameter A - R."""

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


class _Whitened:
    """The leaves V and c in place of the weight W_0 + unit V S and the bias c - V S mu.

    Args:
        weight: [..., n, D]; rows beyond the rank are leaves themselves.
        bias: [..., n].
        names: The names of weight and bias.
        whitening: S and mu.
        rank: r.
        unit: The number by which h is divided in the function's input.
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


class Coordinates:
    """The leaves that an optimiser moves to train an edit, or E independent ones, from now on."""

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
                # A gate's input is h / rms(h); the rms of all states stands for rms(h).
                unit = whitening.rms
                self._parts[names[0]] = _Whitened(weight, bias, names, whitening, rank, unit)
        self.moved: Mapping[str, Tensor] = parameters | {
            name: value for part in self._parts.values() for name, value in part.moved.items()
        }
        """Leaves by parameter name; a parameter that no leaf replaces is a leaf itself."""

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set the gradients of all leaves from those of the parameters; project that of each R."""
        for part in self._parts.values():
            part.pull_back()
        for basis in self._edit.bases().values():
            if basis.grad is not None:
                # The fused AdamW kernel assumes that gradients have the parameters' memory layout.
                basis.grad = tangent(basis.grad, basis).contiguous()

    @torch.no_grad()
    def follow(self) -> None:
        """Set the parameters from the leaves, and make the bases orthonormal again."""
        self._edit.retract()
        for part in self._parts.values():
            part.follow()
