"""Numbers printed in the paper, shown beside ours in reports (Liu et al. 2025, arXiv 2503.00306).

They are in `paper.yaml`. A number is looked up for the same model, data set, protocol and method; a
model that the paper did not use has none.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from baft_easyedit.bench.results import Result
from baft_easyedit.bench.scores import TEACHER_FORCED


class PaperNumbers:
    """The content of `paper.yaml`."""

    def __init__(self) -> None:
        text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        self.citation: str = content["citation"]
        self._names = {name: model for model, names in content["models"].items() for name in names}
        self._scores = {
            (entry["table"], entry["model"], entry["dataset"], T): methods
            for entry in content["scores"]
            for T, methods in entry["by_T"].items()
        }
        self._costs = content["costs"]

    def _family(self, model: str) -> str | None:
        """Return the name in `paper.yaml` of a model such as `meta-llama/Llama-2-7b-hf`, if any."""
        return self._names.get(model.rsplit("/", 1)[-1].lower())

    def score(self, result: Result, name: str, tables: Sequence[int]) -> str:
        """Return the paper's teacher-forced score of a cell, as printed; empty if there is none.

        The first of `tables` that has one counts: the ablation prints other scores than Table 2 for
        the same methods and protocol.
        """
        if result.setting.batch_size > 1:
            return ""
        place = self._family(result.model), result.dataset, result.setting.T
        for table in tables:
            scores = self._scores.get((table, *place), {}).get(result.method, ())
            numbers = dict(zip(TEACHER_FORCED, scores, strict=False))  # ends before portability
            if name in numbers:
                return f"{numbers[name]:.2f}"
        return ""

    def cost(self, result: Result, name: str) -> str:
        """Return `trainable_parameters` or `edit_time_s` (on a V100) as printed, if it is."""
        number = self._costs.get(self._family(result.model), {}).get(result.method, {}).get(name)
        return "" if number is None else f"{number:,}"
