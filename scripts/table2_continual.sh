#!/usr/bin/env bash
# Table 2: ZsRE, 1, 10, 100 and 1000 edits in a row, scored after the last; LLaMA-2-7B.
# Expected: some 332 GPU hours for all methods, 27 for BaFT and ReFT,
#   by the paper's seconds per edit on a V100 (those of a similar method where it gives none).
#   table2_continual.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/table2_continual}
baft-easyedit bench bench/zsre_continual --data "$data/zsre" --out "$out" "$@"
baft-easyedit report "$out"
