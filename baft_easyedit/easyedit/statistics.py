"""Statistics of a model's keys from local texts, for MEMIT and its kin.

EasyEdit would download Wikipedia for these. It reads a ready file where there is one, so the files
are written here in its format. A key k is the input of a rewritten module, such as a layer's
`mlp.down_proj`, at one token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baft_easyedit.files.writing import written_whole

_DATASET = "wikipedia"
"""The name in EasyEdit's file names; the texts are ours."""
_BATCH = 16


def statistics_file(stats_dir: Path, model_name: str, module: str, num_texts: int) -> Path:
    """Return the file in which EasyEdit looks for a module's statistics.

    Args:
        stats_dir: `stats_dir` of the hyper-parameters.
        model_name: The model's name in file names: the last part of its path, or (release) the
            whole path with `_` for `/`.
        module: Name of the module in the model, such as `model.layers.4.mlp.down_proj`.
        num_texts: `mom2_n_samples` of the hyper-parameters.
    """
    name = f"{module}_float32_mom2_{num_texts}.npz"
    return stats_dir / model_name / f"{_DATASET}_stats" / name


def read_key_statistics(
    modules: Sequence[str], num_texts: int, stats_dir: Path, model_name: str
) -> dict[str, Tensor] | None:
    """Return what `write_key_statistics` wrote; None if a file of it is missing.

    Args:
        modules: Names of modules.
        num_texts: Number of texts that they were written for.
        stats_dir: Where the files are.
        model_name: The name under which they were written.
    """
    files = {
        module: statistics_file(stats_dir, model_name, module, num_texts) for module in modules
    }
    if not all(file.is_file() for file in files.values()):
        return None
    moments = {}
    for module, file in files.items():
        with np.load(file) as saved:
            moments[module] = torch.from_numpy(saved["mom2.mom2"]) / int(saved["mom2.count"])
    return moments


def write_key_statistics(
    model: nn.Module,
    tok: Any,
    modules: Sequence[str],
    texts: Sequence[str],
    stats_dir: Path,
    model_name: str,
    max_length: int = 256,
) -> dict[str, Tensor]:
    """Write the second moments of keys, sum k kᵀ, over all tokens of some texts.

    Each file appears complete or not at all, so several processes may write the same ones.

    Args:
        model: An unedited model.
        tok: Its tokenizer.
        modules: Names of the modules whose inputs are the keys.
        texts: What the model reads.
        stats_dir: Where the files go; see `statistics_file`.
        model_name: The model's name in file names.
        max_length: Longest text in tokens; the rest is cut.

    Returns:
        The mean of k kᵀ for each module, [I, I] with I the width of its input, fp32.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("texts must hold at least one text; got none")
    sums, count = _sum_moments(model, tok, modules, texts, max_length)
    for module in modules:
        content: dict[str, Any] = {
            "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": sums[module].numpy(),
            "sample_size": len(texts),
        }
        with written_whole(statistics_file(stats_dir, model_name, module, len(texts))) as file:
            np.savez(file, **content)
    return {module: sums[module] / count for module in modules}


def _sum_moments(
    model: nn.Module, tok: Any, modules: Sequence[str], texts: Sequence[str], max_length: int
) -> tuple[dict[str, Tensor], int]:
    """Return sum k kᵀ [I, I] of each module, and the number of tokens."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)

    def adder(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            keys = args[0][real].float()  # [N, I]
            product = keys.mT @ keys
            sums[name] = product if name not in sums else sums[name].add_(product)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(adder(name)) for name in modules]
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
    return {name: total.cpu() for name, total in sums.items()}, count


def write_null_space(
    moments: Sequence[Tensor], file: Path, threshold: float | None = None, share: float = 0.7
) -> None:
    """Write AlphaEdit's projectors on the directions that keys hardly use.

    Args:
        moments: Mean of k kᵀ for each edited layer, [I, I].
        file: `P_loc` of the hyper-parameters.
        threshold: Take the eigenvectors with eigenvalues below this, as EasyEdit does; its 2e-2 is
            for 7B models and Wikipedia. If None, the share decides.
        share: Share of all directions, those with the smallest eigenvalues, in (0, 1).

    Raises:
        ValueError: If `share` is out of range, or no direction is below the threshold.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1); got {share}")
    projectors = []
    for moment in moments:
        values, vectors = torch.linalg.eigh(moment)  # [I], [I, I]  ascending
        count = round(share * len(values)) if threshold is None else int((values < threshold).sum())
        if count == 0:
            raise ValueError(
                f"nullspace_threshold must leave a direction; {threshold} is below all eigenvalues "
                f"(the least is {values[0]:.2g}): raise it, or set null to take a share"
            )
        unused = vectors[:, :count]
        projectors.append((unused @ unused.mT).cpu())
    with written_whole(file) as opened:
        torch.save(torch.stack(projectors), opened)
