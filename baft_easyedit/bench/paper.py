"""Numbers printed in the paper, to stand beside ours (Liu et al. 2025, arXiv 2503.00306).

They are in `paper.yaml`. A number is looked up for the same model, data set, protocol and method; a
model that the paper did not use has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import TEACHER_FORCED
from baft_easyedit.files.messages import short

ByMethod = Mapping[str, Mapping[str, float]]
"""For each method its numbers, under the names of a summary's fields."""


@dataclass(frozen=True)
class PaperNumbers:
    """What `paper.yaml` holds."""

    citation: str
    names: Mapping[str, str]
    """For each name of a model what it is called here."""
    score_tables: Mapping[tuple[int, str, str, Protocol], ByMethod]
    """Teacher-forced scores by table, model, data set and protocol."""
    cost_tables: Mapping[str, ByMethod]
    """`trainable_parameters` and `edit_time_s` (on a V100) by model."""

    def family(self, model: str) -> str | None:
        """Return what a model is called here; None if the paper did not use it.

        Args:
            model: A name such as `llama-2-7b` or `meta-llama/Llama-2-7b-hf`.
        """
        return self.names.get(model.rsplit("/", 1)[-1].lower())

    def check_model(self, model: str) -> str:
        """Return what a model is called here.

        Raises:
            ValueError: If the paper did not use it.
        """
        family = self.family(model)
        if family is None:
            known = ", ".join(dict.fromkeys(self.names.values()))
            raise ValueError(
                f"paper_model must be a model of the paper, {known}; got {short(model)}"
            )
        return family

    def scores(
        self, tables: Sequence[int], family: str | None, dataset: str, protocol: Protocol
    ) -> ByMethod:
        """Return the scores that the paper prints; empty if none are known.

        Args:
            tables: Numbers of the paper's tables; the first that has scores for the rest counts.
                The ablation has others than Table 2 for the same methods and protocol.
            family: A model, as `family` returns it.
            dataset: Kind of data, such as `zsre`.
            protocol: T and batch size.
        """
        for table in tables:
            found = self.score_tables.get((table, family or "", dataset, protocol))
            if found is not None:
                return found
        return {}

    def costs(self, family: str | None) -> ByMethod:
        """Return parameters and seconds that the paper prints for a model; empty if none."""
        return self.cost_tables.get(family or "", {})


def read_paper_numbers() -> PaperNumbers:
    """Read `paper.yaml`, which comes with the package."""
    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return PaperNumbers(
        citation=content["citation"],
        names={name: model for model, names in content["models"].items() for name in names},
        score_tables={
            (entry["table"], entry["model"], entry["dataset"], Protocol(T)): {
                # The paper's rows end before portability.
                method: dict(zip(TEACHER_FORCED, scores, strict=False))
                for method, scores in methods.items()
            }
            for entry in content["scores"]
            for T, methods in entry["by_T"].items()
        },
        cost_tables=content["costs"],
    )
