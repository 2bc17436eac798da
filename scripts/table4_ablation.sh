#!/usr/bin/env bash
# Table 4: from ReFT to BaFT, 100 edits in a row; LLaMA-2-7B.
# Expected: some 19 GPU hours by the paper's seconds per edit on a V100 (those of a similar method where it gives none).
#   table4_ablation.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/table4_ablation}
baft-easyedit bench bench/ablation --data "$data/zsre" --out "$out" "$@"
baft-easyedit report "$out"
