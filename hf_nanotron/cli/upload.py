"""`hf-nanotron upload`: send the checkpoints of an output directory to a store, as a run would have done."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder of a run, with its checkpoint-N/")
    parser.add_argument(
        "url", metavar="URL", help="URL of the store, as in remote_checkpoints, such as s3://bucket/run"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after this many seconds (default: never)"
    )
    parser.set_defaults(run=_upload)


def _upload(args: argparse.Namespace) -> None:
    import math
    import time

    from ..checkpoint.directory.retention import newest
    from ..checkpoint.directory.verify import is_committed
    from ..checkpoint.remote.bar import UploadBar
    from ..checkpoint.remote.store import RemoteStore
    from ..checkpoint.remote.upload import Uploader

    if args.timeout is not None and not args.timeout >= 0:
        raise ValueError(f"--timeout {args.timeout} must be at least 0.")
    if not args.output_dir.is_dir():
        found = "is a file" if args.output_dir.exists() else "does not exist"
        raise ValueError(f"{args.output_dir} {found}; give the folder of a run, with its checkpoint-N.")
    here = newest(args.output_dir)
    if not here:
        if is_committed(args.output_dir):
            raise ValueError(f"{args.output_dir} is a checkpoint; give the folder of the run that it is in.")
        begun = sorted(path.name for path in args.output_dir.glob("checkpoint-*"))
        half = f"; of {begun[0]} the save was not completed" if begun else ""
        raise ValueError(f"{args.output_dir} has no committed checkpoint-N, so there is nothing to upload{half}.")
    deadline = time.monotonic() + (math.inf if args.timeout is None else args.timeout)
    # Nothing is deleted here, where a run would keep but a few.
    uploader = Uploader(RemoteStore(args.url), args.output_dir, keep_local=len(here))
    uploader.submit_existing()
    with UploadBar(uploader) as bar:
        while not uploader.wait(0.2) and time.monotonic() < deadline:
            bar.show()
    missing = uploader.what_is_missing()
    uploader.close()
    if missing:
        raise RuntimeError(missing)
    if uploader.damaged:
        raise RuntimeError(f"Damaged and not uploaded to {uploader.store.url}: {', '.join(uploader.damaged)}.")
    print(f"{uploader.store.url} is up to date: {uploader.uploaded} checkpoints were uploaded.")
