"""How many tokens an optimizer needs to the loss that another one ends with: runs of one small Llama on real text.

    python tokens_to_loss.py --out text.jsonl --row name=adamw,learning_rate=0.0012 \\
        --row name=muon,optim=muon,learning_rate=0.0012,share=0.75

Every row begins from the same weights and reads the same samples in the same order. A row's `share` is its part of
`--steps`: it warms up over a tenth of its own steps and decays to zero over the rest, since a loss in the middle of a
longer run is not what a run of that length ends with. So an optimizer that ends below another one's loss with
`share=0.75` needs at most 0.75 of its tokens. Each is to be tried at the same number of rates.

Prints a JSON line for each row: its steps, tokens and seconds, the mean loss of each ten steps and of the last twenty.
The model is that of `real_text_loss.py`; 400 steps of 32 samples of 1,024 tokens read about 48 MB, once.
"""

import gc
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from real_text import blocks, byte_pairs, documents
from real_text_loss import LAST, make_parser, means, train
from rows import label, parse_row


def of_its_length(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """The row's training arguments, with the steps that its share of `steps` leaves.

    Raises:
        ValueError: a share outside (0, 1], or too small to average the last losses.
    """
    row = dict(row)
    share = row.pop("share", 1.0)
    own = round(steps * share)
    if not 0 < share <= 1 or own < LAST:
        raise ValueError(f"share={share} of {steps} steps: say a part up to 1 that leaves {LAST} steps at least.")
    return {**row, "max_steps": own, "warmup_steps": max(1, own // 10)}


def main() -> None:
    parser = make_parser(__doc__, steps=400, megabytes=52.0)
    cli = parser.parse_args()
    rows = [of_its_length(parse_row(text), cli.steps) for text in cli.row or [""]]
    texts = documents(cli.megabytes)
    found = blocks(texts, byte_pairs(texts, cli.vocabulary), cli.sequence_length)
    samples = Dataset.from_dict({"input_ids": found, "labels": found}).with_format("torch")
    print(f"{len(texts)} documents, {len(samples)} samples of {cli.sequence_length} tokens", flush=True)
    for row in rows:
        began = time.monotonic()
        losses = train(row, samples, cli)
        gc.collect()
        result = {
            "name": label(row),
            "row": row,
            "steps": len(losses),
            "tokens": len(losses) * cli.per_device_train_batch_size * cli.sequence_length,
            "loss": round(statistics.fmean(losses[-LAST:]), 5),
            "means": [round(mean, 4) for mean in means(losses)],
            "seconds": round(time.monotonic() - began, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        print(json.dumps(result), flush=True)
        if cli.out is not None:
            with cli.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
