"""Adapter for EasySteer (its overlay of vLLM 0.26.0): a ReFT edit as its own `loreft` algorithm.

No hook is needed: EasySteer itself can act on the last P prompt tokens and all generated ones, as
edits do, also under chunked prefill and prefix caching. Its algorithms have no gate, and requests
cannot name other algorithms, so an edit with a gate is refused.
"""

import os
from typing import Any

from baft_easyedit.engines.served import read_edit
from baft_easyedit.model.hooks import ModelEdit


def check_gate(edit: ModelEdit, where: str) -> None:
    """Raise ValueError unless an edit is one of ReFT, which has no gate, and acts everywhere."""
    if edit.gate != "one":
        raise ValueError(
            f"gate must be 'one' (ReFT) for EasySteer, whose algorithms have no gate; that of the "
            f"edit in {where} is {edit.gate!r}: serve it by vllm-lens or sglang"
        )
    if edit.min_similarity is not None:
        raise ValueError(
            "min_similarity must be null for EasySteer, whose algorithms act everywhere; the edit "
            f"in {where} has one: serve it by vllm-lens or sglang"
        )


def specification(directory: str | os.PathLike[str]) -> Any:
    """Return a kept ReFT edit as a `SteeringSpec`, for `llm.generate(..., steering=...)`.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the state is damaged, or the edit has a gate.
        ImportError: If vLLM with EasySteer's overlay is not installed.
    """
    from vllm.steer_vectors import ApplySpec, ReftIntervention, SteeringSpec, VectorSpec

    edit = read_edit(directory)
    check_gate(edit, str(directory))
    place = ApplySpec(prompt_window=(-edit.num_prompt_positions, None), generation="all")
    vectors = []
    for layer in edit.layers:
        own = edit.intervention(layer)
        data = ReftIntervention(
            rotate_layer=own.basis.mT,  # [D, r]
            learned_source_weight=own.basis + own.difference,  # [r, D]
            learned_source_bias=own.source_bias,
            layer=layer,
        )
        vectors.append(VectorSpec(algorithm="loreft", data=data, apply=place, layers=[layer]))
    return SteeringSpec(vectors=vectors, conflict="sequential")
