"""Statistics of a model's keys from local texts, for MEMIT, AlphaEdit and ROME with them.

EasyEdit would download Wikipedia for these. It reads a ready file where there is one, so the files
are written here in its format. A key k is the input of a layer's `mlp.down_proj` at one token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DATASET = "wikipedia"
"""The name in EasyEdit's file names; the texts are ours."""
_BATCH = 16


def statistics_file(stats_dir: Path, model_name: str, layer: int, num_texts: int) -> Path:
    """Return the file in which EasyEdit looks for a layer's statistics.

    Args:
        stats_dir: `stats_dir` of the hyper-parameters.
        model_name: The model's name in file names: the last part of its path, or (release) the
            whole path with `_` for `/`.
        layer: Decoder layer, 0-based.
        num_texts: `mom2_n_samples` of the hyper-parameters.
    """
    name = f"model.layers.{layer}.mlp.down_proj_float32_mom2_{num_texts}.npz"
    return stats_dir / model_name / f"{_DATASET}_stats" / name


def write_key_statistics(
    model: nn.Module,
    tok: Any,
    layers: Sequence[int],
    texts: Sequence[str],
    stats_dir: Path,
    model_names: Sequence[str],
    max_length: int = 256,
) -> dict[int, Tensor]:
    """Write the second moments of keys, sum k kᵀ, over all tokens of some texts.

    Args:
        model: An unedited Llama.
        tok: Its tokenizer.
        layers: Decoder layers, 0-based.
        texts: What the model reads.
        stats_dir: Where the files go; see `statistics_file`.
        model_names: Names under which they are written.
        max_length: Longest text in tokens; the rest is cut.

    Returns:
        The mean of k kᵀ for each layer, [I, I] with I the MLP's width, fp32.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("texts must hold at least one text; got none")
    sums, count = _sum_moments(model, tok, layers, texts, max_length)
    for layer in layers:
        for model_name in model_names:
            file = statistics_file(stats_dir, model_name, layer, len(texts))
            file.parent.mkdir(parents=True, exist_ok=True)
            content: dict[str, Any] = {
                "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
                "mom2.count": count,
                "mom2.mom2": sums[layer].numpy(),
                "sample_size": len(texts),
            }
            np.savez(file, **content)
    return {layer: sums[layer] / count for layer in layers}


def _sum_moments(
    model: nn.Module, tok: Any, layers: Sequence[int], texts: Sequence[str], max_length: int
) -> tuple[dict[int, Tensor], int]:
    """Return sum k kᵀ [I, I] of each layer, and the number of tokens."""
    sums: dict[int, Tensor] = {}
    real = torch.empty(0)

    def adder(layer: int) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            keys = args[0][real].float()  # [N, I]
            sums[layer] = sums.get(layer, torch.zeros(())) + (keys.mT @ keys).cpu()

        return add

    handles = [
        model.get_submodule(f"model.layers.{i}.mlp.down_proj").register_forward_pre_hook(adder(i))
        for i in layers
    ]
    device = next(model.parameters()).device
    ids = sorted((tok.encode(t, truncation=True, max_length=max_length) for t in texts), key=len)
    count = 0
    try:
        with torch.no_grad():
            for start in range(0, len(ids), _BATCH):
                batch = nn.utils.rnn.pad_sequence(
                    [torch.tensor(row) for row in ids[start : start + _BATCH]], batch_first=True
                )
                lengths = torch.tensor([len(row) for row in ids[start : start + _BATCH]])
                real = (torch.arange(batch.shape[1]) < lengths[:, None]).to(device)  # [B, T]
                model(input_ids=batch.to(device), attention_mask=real.long())
                count += int(real.sum())
    finally:
        for handle in handles:
            handle.remove()
    return sums, count


def write_null_space(moments: Sequence[Tensor], file: Path, share: float = 0.7) -> None:
    """Write AlphaEdit's projectors on the directions that keys hardly use.

    EasyEdit takes the eigenvectors below a fixed eigenvalue, 2e-2, chosen for 7B models; here it is
    the share of all directions with the smallest eigenvalues.

    Args:
        moments: Mean of k kᵀ for each edited layer, [I, I].
        file: `P_loc` of the hyper-parameters.
        share: Share of directions, in (0, 1).

    Raises:
        ValueError: If `share` is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1); got {share}")
    projectors = []
    for moment in moments:
        vectors = torch.linalg.eigh(moment).eigenvectors  # [I, I]  ascending eigenvalues
        unused = vectors[:, : round(share * len(moment))]
        projectors.append(unused @ unused.mT)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.stack(projectors), file)
