#!/usr/bin/env bash
# Train with the checkpoints in a bucket, lose the disk, go on from the bucket.
#   ./run.sh                          against a server of the S3 protocol on this machine (pip install 'moto[s3,server]')
#   ./run.sh s3://my-bucket/some/run  against a bucket of yours, with the credentials that the AWS tools find
# PYTHON names the interpreter, PROCESSES how many train (data parallel).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
url=${1:-}

if [ -z "$url" ]; then
    url=s3://bucket/run
    export AWS_ENDPOINT_URL=http://127.0.0.1:${PORT:-5555}
    export AWS_ACCESS_KEY_ID=anyone AWS_SECRET_ACCESS_KEY=anything AWS_DEFAULT_REGION=us-east-1
    export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
    "$python" -m moto.server -H 127.0.0.1 -p "${PORT:-5555}" >/dev/null 2>&1 &
    trap 'kill $!' EXIT
    "$python" - <<'PYTHON'
import time
import s3fs

for attempt in range(30):
    try:
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        break
    except OSError:
        time.sleep(1)
else:
    raise SystemExit("the local S3 server does not answer: pip install 'moto[s3,server]'")
PYTHON
fi

train() {
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m torch.distributed.run --standalone \
        --nproc-per-node "${PROCESSES:-2}" "$here/train.py" --url "$url" --output-dir "$here/out" "$@"
}

echo "== 1/3 20 steps, with checkpoints to $url"
rm -rf "$here/out"
train --max-steps 20

echo "== 2/3 the disk is lost"
rm -rf "$here/out"

echo "== 3/3 20 more steps, from the bucket"
train --max-steps 40 --resume
ls "$here/out"
