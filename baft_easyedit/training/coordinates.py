"""Coordinates of training: the leaf tensors that the optimiser moves in place of the parameters.

The leaves are A, b, R and the gate of Eq. 3 (Liu et al. 2025), while the parameter of an
intervention is A - R. A training step computes the gradients of the parameters;
`Coordinates.pull_back` turns them into those of the leaves, the optimiser moves the leaves, and
`Coordinates.follow` sets the parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from baft_easyedit.method.intervention import tangent
from baft_easyedit.model.hooks import ModelEdit


class Coordinates:
    """The leaves that an optimiser moves to train an edit, or E independent ones, from now on."""

    def __init__(self, edit: ModelEdit) -> None:
        self._edit = edit
        parameters = edit.learned_parameters()
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # A - R, R and A of each layer
        sources = {}
        for name, basis in edit.bases().items():
            own = name.replace("basis", "difference")
            sources[own] = (parameters[own] + basis).detach().requires_grad_()
            self._parts.append((parameters[own], basis, sources[own]))
        self.moved: Mapping[str, Tensor] = parameters | sources
        """Leaves by parameter name; a parameter that no leaf replaces is a leaf itself."""

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set the gradients of all leaves from those of the parameters; project that of each R."""
        for difference, basis, source in self._parts:
            source.grad = difference.grad
            if basis.grad is not None and difference.grad is not None:
                # The fused AdamW kernel assumes that gradients have the parameters' memory layout.
                basis.grad = tangent(basis.grad - difference.grad, basis).contiguous()

    @torch.no_grad()
    def follow(self) -> None:
        """Set the parameters from the leaves, and make the bases orthonormal again."""
        self._edit.retract()
        for difference, basis, source in self._parts:
            difference.copy_(source - basis)
