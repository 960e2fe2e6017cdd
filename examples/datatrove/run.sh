#!/usr/bin/env bash
# Tokenize with datatrove, look at the tokens, train on two processes.
# PYTHON names the interpreter, PROCESSES how many train; extra arguments go to train.py.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

echo "== 1/3 datatrove tokenizes the Python standard library"
"$python" "$here/prepare.py" --output-dir "$here/out"

echo "== 2/3 what it has written"
"$python" -m hf_nanotron.cli data inspect "$here/out/tokens" --sequence-length 256 \
    --tokenizer "$here/out/tokenizer"

echo "== 3/3 training"
rm -rf "$here/out/run" # an earlier run's result must not pass for this one's
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m torch.distributed.run --standalone \
    --nproc-per-node "${PROCESSES:-2}" "$here/train.py" --output-dir "$here/out" "$@"
