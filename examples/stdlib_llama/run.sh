#!/usr/bin/env bash
# The whole example: prepare the data, train on every process this machine is good for, generate, say what is where.
# PYTHON names the interpreter; extra arguments go to train.py (for example: ./run.sh --max-steps 1000).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
out=$here/out

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
case $gpus in
    0) processes=4 tp=2 pp=2 where="four CPU processes" ;;
    1) processes=1 tp=1 pp=1 where="one GPU" ;;
    2 | 3) processes=2 tp=2 pp=1 where="two GPUs" ;;
    *) processes=$((gpus / 4 * 4)) tp=2 pp=2 where="$((gpus / 4 * 4)) GPUs" ;; # what tp x pp leaves is data parallel
esac

echo "== 1/3 data and tokenizer from the Python standard library"
"$python" "$here/prepare.py" --output-dir "$out"

echo "== 2/3 pretraining on $where: tp $tp x pp $pp x dp $((processes / tp / pp))"
rm -rf "$out"/checkpoint-* "$out/loss.png" # an earlier run's result must not pass for this one's
# One thread a process: there may be more processes than cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    "$here/train.py" --output-dir "$out" --tp-size "$tp" --pp-size "$pp" "$@"

echo "== 3/3 text from the checkpoint, in a process that knows only transformers"
checkpoint=$(find "$out" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -n 1)
"$python" "$here/generate.py" "$checkpoint"

echo
echo "checkpoint: $checkpoint"
if [ -f "$out/loss.png" ]; then echo "loss curve: $out/loss.png"; fi
