"""Make a task of lm-evaluation-harness from PIQA's own files, for machines without a network.

python scripts/piqa_task.py DIR_OF_PIQA OUT
baft-easyedit eval KEPT --tasks piqa --include-path OUT

DIR_OF_PIQA has valid.jsonl and valid-labels.lst. The task is the harness' own but for its data.
"""

import json
import sys
from pathlib import Path

TASK = """task: piqa
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def main(source: Path, out: Path) -> None:
    """Write the task and its questions with their labels."""
    # Only a line feed ends a line, for JSON may hold other separators.
    lines = (source / "valid.jsonl").read_text(encoding="utf-8").rstrip().split("\n")
    labels = (source / "valid-labels.lst").read_text(encoding="utf-8").split()
    records = [{**json.loads(q), "label": int(a)} for q, a in zip(lines, labels, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    data = out.absolute() / "piqa.jsonl"
    data.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    (out / "piqa.yaml").write_text(TASK.format(data=json.dumps(str(data))), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
