#!/usr/bin/env bash
# Figure 3: ZsRE, edit calls of 10 and 50 records; LLaMA-2-7B. Figures 1 and 2 come with table1_single.sh.
# Expected: some 16 GPU hours for all methods,
#   by the paper's seconds per edit on a V100 (those of a similar method where it gives none), taken per call.
#   figure3_batched.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/figure3_batched}
baft-easyedit bench bench/zsre_batched --data "$data/zsre" --out "$out" "$@"
baft-easyedit report "$out"
