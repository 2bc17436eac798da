#!/usr/bin/env bash
# What only a GPU can tell, in at most six minutes on an H100 or H200: the tests for it; time and memory of an edit at
# the shape of LLaMA-2-7B (random weights, no network), first and warm, in each precision, side by side and in a row;
# and EasyEdit's methods on the same weights, where EASYEDIT_HOME names a clone. A part that fails or takes too long
# does not stop the others. OUT_DIR gets a log and a JSON of each part, and gpu_check.json of all.
#   gpu_check.sh OUT_DIR [SHAPE [DEVICE]]
# A dry run without a GPU, with ten times as long for each part: TIMES=10 gpu_check.sh OUT_DIR llama-4x128 cpu
set -uo pipefail
case "${1:--}" in -*) sed -n '2,/^set/s/^# //p' "$0" >&2; exit 2 ;; esac
out=$1 shape=${2:-llama-2-7b} device=${3:-0} seconds=$((360 * ${TIMES:-1}))
python=${PYTHON:-python} here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
trap 'kill $! 2> /dev/null; exit 130' INT TERM
mkdir -p "$out" && : > "$out/parts.txt" || exit

part() { # NAME LIMIT COMMAND...: run one part for so many seconds at most
  local name=$1 limit=$(($2 * ${TIMES:-1})) rc=0 start=$SECONDS
  shift 2
  rm -f "$out/$name.json"
  [ "$limit" -le $((seconds - SECONDS)) ] || limit=$((seconds - SECONDS))
  if [ "$limit" -le 0 ]; then
    rc=124
  else
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 & # so that an interrupt is seen at once
    wait $! || rc=$?
  fi
  echo "$name $rc $((SECONDS - start))" | tee -a "$out/parts.txt"
}
speed() { # NAME LIMIT OPTIONS...
  part "$1" "$2" "$python" -m baft_easyedit speed --device "$device" --out "$out/$1.json" "${@:3}"
}
ours() { speed "$1" "$2" --shape "$shape" --methods BaFT-cached --repeats 2 --new-tokens 0 "${@:3}"; }

part tests 60 "$python" -m pytest -q "$here/../tests/test_gpu.py" "$here/../tests/test_cuda_graph.py"
speed bf16-32 60 --shape "$shape" --dtype bfloat16 --repeats 3 --profile
ours bf16-256 30 --dtype bfloat16 --prompt-length 256
ours bf16-1024 30 --dtype bfloat16 --prompt-length 1024
ours fp16-32 30 --dtype float16
ours fp32-32 40 --dtype float32
for count in 8 64; do
  part "apart-$count" 45 "$python" "$here/gpu_parts.py" apart "$shape" "$device" "$out/apart-$count.json" "$count"
done
part in-a-row-16 45 "$python" "$here/gpu_parts.py" in_a_row "$shape" "$device" "$out/in-a-row-16.json" 16
if [ -n "${EASYEDIT_HOME:-}" ]; then
  weights=$(mktemp -d "$out/weights.XXXX")
  trap 'rm -rf "$weights"' EXIT
  part weights 40 "$python" "$here/gpu_parts.py" weights "$shape" "$device" "$weights"
  speed easyedit 120 --model "$weights" --dtype bfloat16 --methods BaFT-cached,FT-M,UltraEdit,ROME --repeats 1 --new-tokens 0
fi
"$python" "$here/gpu_parts.py" table "$out"
