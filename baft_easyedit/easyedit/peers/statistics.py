"""Statistics of a model's keys on local texts, for MEMIT and its kin.

EasyEdit would download Wikipedia to compute these. If it finds their files, it reads them instead,
so they are written here, in its format, from local texts. A key k is the input of a rewritten
module, such as a layer's `mlp.down_proj`, at one token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.files.writing import written_whole

_BATCH = 16
_MAX_LENGTH = 256
"""Longest text in tokens; the rest is cut."""
_SHARE = 0.7
"""Share of all directions that AlphaEdit edits in, if it has no threshold."""


def write_statistics(editor: Any, texts: Sequence[str]) -> None:
    """Write the key statistics that a peer's hyper-parameters point to, unless they are there.

    Each file appears complete or not at all, so several processes may write the same ones. Does
    nothing for a method that needs none.

    Raises:
        ValueError: If there are no texts, or no direction is below AlphaEdit's threshold.
    """
    h, model = editor.hparams, editor.model
    if not getattr(h, "mom2_adjustment", False):
        return
    if not texts:
        raise ValueError("texts must hold at least one text; got none")
    modules = [h.rewrite_module_tmp.format(layer) for layer in h.layers]
    path = str(model.config._name_or_path)
    name = path.replace("/", "_") if loaded_generation() == "pypi" else path.rsplit("/", 1)[-1]
    folder = Path(h.stats_dir) / name / "wikipedia_stats"  # EasyEdit's name; the texts are ours
    files = {module: folder / f"{module}_float32_mom2_{len(texts)}.npz" for module in modules}
    if not all(file.is_file() for file in files.values()):
        _write_moments(model, editor.tok, texts, files)
    if hasattr(h, "P_loc") and not Path(h.P_loc).is_file():
        device = next(model.parameters()).device
        moments = [_mean_moment(file).to(device) for file in files.values()]
        write_null_space(moments, Path(h.P_loc), h.nullspace_threshold)


def _write_moments(
    model: nn.Module, tok: Any, texts: Sequence[str], files: Mapping[str, Path]
) -> None:
    """Write the second moments of keys over all tokens of some texts, a file for each module."""
    sums, count = _sum_moments(model, tok, texts, list(files))
    for module, file in files.items():
        content: dict[str, Any] = {
            "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": sums[module].numpy(),
            "sample_size": len(texts),
        }
        with written_whole(file) as opened:
            np.savez(opened, **content)


def _mean_moment(file: Path) -> Tensor:
    """Read the mean of k kᵀ, [I, I] with I the width of a module's input, fp32."""
    with np.load(file) as saved:
        return torch.from_numpy(saved["mom2.mom2"]) / int(saved["mom2.count"])


def _sum_moments(
    model: nn.Module, tok: Any, texts: Sequence[str], modules: Sequence[str]
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
    ids = sorted((tok.encode(t, truncation=True, max_length=_MAX_LENGTH) for t in texts), key=len)
    try:
        with torch.no_grad():
            for start in range(0, len(ids), _BATCH):
                rows = [torch.tensor(row) for row in ids[start : start + _BATCH]]
                batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
                lengths = torch.tensor([len(row) for row in rows])
                real = (torch.arange(batch.shape[1]) < lengths[:, None]).to(device)  # [B, T]
                model(input_ids=batch.to(device), attention_mask=real.long())
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() for name, total in sums.items()}, sum(map(len, ids))


def write_null_space(moments: Sequence[Tensor], file: Path, threshold: float | None = None) -> None:
    """Write AlphaEdit's projectors on the directions that keys hardly use.

    Args:
        moments: Mean of k kᵀ for each edited layer, [I, I].
        file: `P_loc` of the hyper-parameters.
        threshold: Take the eigenvectors with eigenvalues below this, as EasyEdit does; its 2e-2 is
            for 7B models and Wikipedia. If None, take a fixed share of those with the smallest.

    Raises:
        ValueError: If no direction is below the threshold.
    """
    projectors = []
    for moment in moments:
        values, vectors = torch.linalg.eigh(moment)  # [I], [I, I]  ascending
        count = (
            round(_SHARE * len(values)) if threshold is None else int((values < threshold).sum())
        )
        if count == 0:
            raise ValueError(
                f"nullspace_threshold must leave a direction; {threshold} is below all eigenvalues "
                f"(the least is {values[0]:.2g}): raise it, or set null to take a share"
            )
        unused = vectors[:, :count]
        projectors.append((unused @ unused.mT).cpu())
    with written_whole(file) as opened:
        torch.save(torch.stack(projectors), opened)
