#!/usr/bin/env bash
# Table 2 on LLaMA-3-8B-Instruct and Gemma-1.1-7b-it, with parameters and times (Tables 3, 6, 7).
# Expected: some 664 GPU hours for all methods, 54 for BaFT and ReFT,
#   by the paper's seconds per edit on a V100 (those of a similar method where it gives none).
#   other_models_continual.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/other_models_continual}
for model in llama-3-8b-instruct gemma-1.1-7b-it; do
  baft-easyedit bench "bench/zsre_continual_$model" --data "$data/zsre" --out "$out/$model" "$@"
done
baft-easyedit report "$out/llama-3-8b-instruct" "$out/gemma-1.1-7b-it" --out "$out/report"
