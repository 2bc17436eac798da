#!/usr/bin/env bash
# Table 8: PIQA before and after 100 ZsRE edits in a row; LLaMA-2-7B.
# Expected: some 8 GPU hours for all methods, 1 for BaFT and ReFT,
#   by the paper's seconds per edit on a V100 (those of a similar method where it gives none).
#   table8_downstream.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/table8_downstream}
# Where PIQA's own files lie beside ZsRE, no network is needed.
if [ -d "$data/piqa" ]; then
  python "$(dirname "$0")/piqa_task.py" "$data/piqa" "$out-task"
  set -- --include-path "$out-task" "$@"
fi
baft-easyedit bench bench/downstream --data "$data/zsre" --out "$out" "$@"
baft-easyedit report "$out"
