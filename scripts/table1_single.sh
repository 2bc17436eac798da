#!/usr/bin/env bash
# Table 1: single edits on ZsRE, WikiData_recent, WikiData_counterfact, WikiBio, ConvSent; LLaMA-2-7B.
# Expected: some 327 GPU hours for all methods, 27 for BaFT and ReFT,
#   by the paper's seconds per edit on a V100 (those of a similar method where it gives none).
#   table1_single.sh DATA_DIR [further options of `baft-easyedit bench`, such as --model, --limit or --methods]
set -euo pipefail
[ -d "${1:-}" ] || { sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2; }  # says how it is called
data=$1
shift
out=${OUT:-runs/table1_single}
declare -A files=(
  [zsre]=zsre [wikidata_recent]=knowedit/wiki_recent [wikidata_counterfact]=knowedit/wiki_counterfact
  [wikibio]=knowedit/WikiBio [convsent]=knowedit/convsent
)
runs=()
for name in "${!files[@]}"; do
  baft-easyedit bench "bench/${name}_single" --data "$data/${files[$name]}" --out "$out/$name" "$@"
  runs+=("$out/$name")
done
baft-easyedit report "${runs[@]}" --out "$out/report"
