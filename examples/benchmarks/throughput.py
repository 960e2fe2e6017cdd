"""Tokens per second of Llama shapes on random tokens, through `NanotronTrainer`, for any number of layouts in one run.

    torchrun --nproc-per-node 2 throughput.py --shape 8b-10 --sequence-length 8192 \
        --row zero_stage=0 --row zero_stage=1 --row tp_size=2 --out rows.jsonl

Each `--row` holds fields of `NanotronTrainingArguments`, separated by commas. Prints one JSON line for each row on rank
0: what ran, on what, the median and the range of the intervals between two log lines, the bytes a parameter takes
before an optimizer step (weights, gradients and optimizer state, no activations), and with `--profile` how much of the
communication was hidden.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from overlap import overlap_table
from shapes import SHAPES
from transformers import LlamaConfig, TrainerCallback, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments


class Record(TrainerCallback):
    """Keeps the log lines, and the memory that is taken while nothing of a forward is alive."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.state_bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available() and state.global_step:  # the first step makes the optimizer's state
            self.state_bytes = max(self.state_bytes, torch.cuda.memory_allocated())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


class Profile(TrainerCallback):
    """Traces the last steps, from one log line to the next, on rank 0."""

    def __init__(self, first_step: int, directory: str) -> None:
        self.first_step, self.path = first_step, Path(directory) / "trace.json"
        self._profiler: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        if state.global_step == self.first_step:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.__enter__()
        elif self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None


def parse_row(text: str) -> dict[str, Any]:
    """`"tp_size=2,pp_schedule=1f1b"` as keyword arguments."""
    row: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        row[name] = json.loads(value) if value.lstrip("-").isdigit() or value in ("true", "false") else value
    return row


def run(row: dict[str, Any], cli: argparse.Namespace) -> dict[str, Any] | None:
    """Train one layout; its figures on rank 0, None on others."""
    gpu = torch.cuda.is_available()
    base = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": cli.log_every * (1 + cli.intervals + cli.profile),
        "per_device_train_batch_size": cli.per_device_train_batch_size,
        "gradient_accumulation_steps": cli.gradient_accumulation_steps,
        "learning_rate": 3e-4,
        "logging_steps": cli.log_every,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": gpu or cli.bf16,
        "use_cpu": not gpu,
    }
    args = NanotronTrainingArguments(**{**base, **row})
    config = LlamaConfig(max_position_embeddings=cli.sequence_length, **SHAPES[cli.shape])
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (64, cli.sequence_length), generator=generator).tolist()
    record, callbacks = Record(), []
    if cli.profile and gpu:
        callbacks = [Profile(args.max_steps - cli.log_every, args.output_dir)]
    trainer = NanotronTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[record, *callbacks],
    )
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    mesh, parameters = trainer.mesh, model.num_parameters()
    result = None
    if trainer.is_world_process_zero():
        lines = record.lines[1 : 1 + cli.intervals]
        timed = [line["tokens_per_second_per_device"] for line in lines]
        result = {
            "row": row,
            "shape": cli.shape,
            "parameters": parameters,
            "sequence_length": cli.sequence_length,
            "micro_batch": args.per_device_train_batch_size,
            "micro_batches": args.gradient_accumulation_steps,
            "tp": mesh.tp_size,
            "pp": mesh.pp_size,
            "dp": mesh.dp_size,
            "zero_stage": args.zero_stage,
            "tokens_per_second_per_device": round(statistics.median(timed)),
            "spread": [round(min(timed)), round(max(timed))],
            "mfu": round(statistics.median([line.get("mfu", 0.0) for line in lines]), 4),
            "peak_memory_gib": round(max(line["peak_memory_gib"] for line in record.lines), 2),
            "state_bytes_per_parameter": round(record.state_bytes * mesh.tp_size * mesh.pp_size / parameters, 3),
            "estimated_state_bytes_per_parameter": round(
                trainer.memory_report.state * mesh.tp_size * mesh.pp_size / parameters, 3
            ),
            "estimated_total_gib": round(trainer.memory_report.total / 2**30, 2),
            "first_loss": record.lines[0]["loss"],
            "last_loss": record.lines[-1]["loss"],
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if callbacks:
            result["overlap"] = overlap_table(callbacks[0].path)
    mesh.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--per-device-train-batch-size", type=int, default=2)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=4, help="steps between two readings of the clock")
    parser.add_argument("--intervals", type=int, default=5, help="readings, after a first one that is left out")
    parser.add_argument("--row", action="append", help="fields of NanotronTrainingArguments, such as tp_size=2")
    parser.add_argument("--bf16", action="store_true", help="also without a GPU")
    parser.add_argument("--profile", action="store_true", help="trace one more interval: what is hidden?")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    cli = parser.parse_args()
    for text in cli.row or [""]:
        began = time.perf_counter()
        result = run(parse_row(text), cli)
        if result is not None:
            result["seconds"] = round(time.perf_counter() - began, 1)
            line = json.dumps(result)
            print(line, flush=True)
            if cli.out is not None:
                with cli.out.open("a") as file:
                    file.write(line + "\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
