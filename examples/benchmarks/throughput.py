"""Tokens per second on random tokens, of `NanotronTrainer` and of stock `Trainer`, any number of layouts in one run.

    python throughput.py --shape moe-3b-a0.8b --row zero_stage=0 --row trainer=stock,tf32=true --out rows.jsonl
    torchrun --nproc-per-node 2 throughput.py --shape 8b-10 --sequence-length 8192 --row zero_stage=0 --row tp_size=2

Each `--row` holds fields of the training arguments, separated by commas, and may hold

    trainer=stock                   transformers' model and Trainer: bf16 autocast over fp32 weights, fused AdamW, SDPA
    dtype=bfloat16                  of a stock model's weights (and optimizer state)
    experts_implementation=eager    of a stock model; grouped_mm if not named
    per_device_train_batch_size=auto    the largest that fits: halved from --largest-batch until it does

A step takes as many samples in every row: `gradient_accumulation_steps` follows from the micro-batch and
`--samples-per-step` unless the row names it. Without torchrun, each row runs in processes of its own (`--processes`),
so that one that fails, or runs out of memory, is reported and the next goes on. Prints one JSON line for each row: what
ran, on what, the median and the range of the intervals between two log lines, MFU (active parameters, causal
attention counted once), the bytes a parameter takes before an optimizer step, and with `--profile` how much of the
communication was hidden, and (to a file beside `--out`) a table of the kernels.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from kernels import kernel_table
from overlap import overlap_table
from shapes import SHAPES, make_config
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.monitor.flops import active_weights, flops_per_token, peak_flops

LEAST_SECONDS = 30.0  # a row that has less of the budget left is not begun
OUT_OF_MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED")
OUT_OF_MEMORY = 3  # exit status of a process that has reported its row as such
MICRO, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


class Record(TrainerCallback):
    """Keeps the log lines and their times, and the memory that is taken while nothing of a forward is alive."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.times: list[float] = []
        self.state_bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available() and state.global_step:  # the first step makes the optimizer's state
            self.state_bytes = max(self.state_bytes, torch.cuda.memory_allocated())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.lines.append(dict(logs))
            self.times.append(time.perf_counter())


class Profile(TrainerCallback):
    """Traces the last steps, from one log line to the next, on rank 0."""

    def __init__(self, first_step: int, directory: str) -> None:
        self.first_step, self.path = first_step, Path(directory) / "trace.json"
        self._profiler: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        gpu = torch.cuda.is_available()
        if state.global_step == self.first_step:
            kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
            self._profiler = torch.profiler.profile(activities=[kind])
            self._synchronize()
            self._profiler.__enter__()
        elif self._profiler is not None:
            self._synchronize()
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def parse_row(text: str) -> dict[str, Any]:
    """`"tp_size=2,pp_schedule=1f1b"` as keyword arguments."""
    row: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        row[name] = json.loads(value) if value.lstrip("-").isdigit() or value in ("true", "false") else value
    return row


def arguments_of(row: dict[str, Any], cli: argparse.Namespace) -> dict[str, Any]:
    """Training arguments that every row has in common."""
    gpu = torch.cuda.is_available()
    warmup = cli.log_every if cli.warmup is None else cli.warmup
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": warmup + cli.log_every * (cli.intervals + cli.profile),
        "learning_rate": 3e-4,
        "logging_steps": cli.log_every,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": gpu or cli.bf16,
        "use_cpu": not gpu,
        **row,
    }


def nanotron_trainer(row: dict[str, Any], cli: argparse.Namespace, config: Any) -> tuple[type[Trainer], Any, Any]:
    args = NanotronTrainingArguments(**arguments_of(row, cli))
    return NanotronTrainer, AutoModelForCausalLM.from_config(config, parallel=args.parallel), args


def stock_trainer(row: dict[str, Any], cli: argparse.Namespace, config: Any) -> tuple[type[Trainer], Any, Any]:
    """Nothing of ours: the stock classes, on the device from the start."""
    row = dict(row)
    choices: dict[str, Any] = {"dtype": getattr(torch, row.pop("dtype", "float32")), "attn_implementation": "sdpa"}
    if hasattr(config, "num_experts") or "experts_implementation" in row:
        choices["experts_implementation"] = row.pop("experts_implementation", "grouped_mm")
    if row.get("activation_checkpointing"):
        row["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    args = TrainingArguments(**arguments_of({"optim": "adamw_torch_fused", **row}, cli))
    with args.device:
        model = transformers.AutoModelForCausalLM.from_config(config, **choices)
    return Trainer, model, args


TRAINERS = {"nanotron": nanotron_trainer, "stock": stock_trainer}


def run(row: dict[str, Any], cli: argparse.Namespace) -> dict[str, Any] | None:
    """Train one layout; its figures on rank 0, None on others."""
    gpu = torch.cuda.is_available()
    config = make_config(cli.shape, cli.sequence_length)
    transformers.set_seed(0)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    choice = {name: value for name, value in row.items() if name != "trainer"}
    trainer_class, model, args = TRAINERS[row.get("trainer", "nanotron")](choice, cli, config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (64, cli.sequence_length), generator=generator).tolist()
    record, callbacks = Record(), []
    if cli.profile:
        callbacks = [Profile(args.max_steps - cli.log_every, args.output_dir)]
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[record, *callbacks],
    )
    trainer.train()
    result = figures(row, cli, trainer, record) if trainer.is_world_process_zero() else None
    if result is not None and callbacks:
        result["overlap"] = overlap_table(callbacks[0].path)
        if cli.out is not None:
            with cli.out.with_suffix(".kernels.txt").open("a") as file:
                file.write(f"== {json.dumps(row)}\n{kernel_table(callbacks[0].path, cli.log_every)}\n")
    if isinstance(trainer, NanotronTrainer):
        trainer.mesh.close()
    return result


def figures(row: dict[str, Any], cli: argparse.Namespace, trainer: Trainer, record: Record) -> dict[str, Any]:
    """What is reported of a row that ran."""
    args, model = trainer.args, trainer.model
    sizes = {name: getattr(args, name, 1) for name in ("tp_size", "pp_size", "ep_size")}
    cut = sizes["tp_size"] * sizes["pp_size"]
    dp = args.world_size // cut
    shapes = getattr(model, "hub_shapes", None) or {n: tuple(p.shape) for n, p in model.named_parameters()}
    parameters = model.num_parameters()
    flops = flops_per_token(shapes, model.config, cli.sequence_length)
    text = model.config.get_text_config()
    active = sum(active_weights(name, shape, text) for name, shape in shapes.items())

    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * cli.sequence_length * dp
    warmup = cli.log_every if cli.warmup is None else cli.warmup
    first = warmup // cli.log_every - 1  # the log line at which the clock starts
    times = record.times[first : first + 1 + cli.intervals]
    steps = [(end - start) / cli.log_every for start, end in zip(times, times[1:], strict=False)]
    speeds = [tokens / seconds / args.world_size for seconds in steps]
    peak = peak_flops(args.device)
    result = {
        "row": row,
        "shape": cli.shape,
        "parameters": parameters,
        "active_matmul_parameters": round(active + text.vocab_size * text.hidden_size),
        "flops_per_token": flops,
        "sequence_length": cli.sequence_length,
        "micro_batch": args.per_device_train_batch_size,
        "micro_batches": args.gradient_accumulation_steps,
        **{name.removesuffix("_size"): size for name, size in sizes.items()},
        "dp": dp,
        "zero_stage": getattr(args, "zero_stage", None),
        "warmup_steps": warmup,
        "timed_steps": len(steps) * cli.log_every,
        "step_ms": round(1e3 * statistics.median(steps), 2),
        "tokens_per_second_per_device": round(statistics.median(speeds)),
        "spread": [round(min(speeds)), round(max(speeds))],
        "mfu": None if peak is None else round(statistics.median(speeds) * flops / peak, 4),
        "first_loss": record.lines[0]["loss"],
        "last_loss": record.lines[-1]["loss"],
        "device": torch.cuda.get_device_name() if peak is not None or torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        statistic = torch.cuda.memory_stats()
        result["peak_memory_gib"] = round(statistic["allocated_bytes.all.peak"] / 2**30, 2)
        result["peak_reserved_gib"] = round(statistic["reserved_bytes.all.peak"] / 2**30, 2)
        result["allocator_retries"] = statistic["num_alloc_retries"]  # memory was so short that speed suffered
        result["state_bytes_per_parameter"] = round(record.state_bytes * cut / parameters, 3)
    if isinstance(trainer, NanotronTrainer):
        report = trainer.memory_report
        result["estimated_state_bytes_per_parameter"] = round(report.state * cut / parameters, 3)
        result["estimated_total_gib"] = round(report.total / 2**30, 2)
    return result


def attempts(row: dict[str, Any], cli: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row with each micro-batch that may be tried, the largest first."""
    wanted = row.get(MICRO, cli.per_device_train_batch_size)
    size = min(cli.largest_batch, cli.samples_per_step or cli.largest_batch) if wanted == "auto" else int(wanted)
    samples = cli.samples_per_step or size * cli.gradient_accumulation_steps
    while True:
        yield {STEPS: max(1, samples // size), **row, MICRO: size}
        if wanted != "auto" or size == 1:
            return
        size //= 2


def clear(error: BaseException | None = None) -> None:
    """Free what a row, also one that failed, has left."""
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(result: dict[str, Any], cli: argparse.Namespace) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    if cli.out is not None:
        with cli.out.open("a") as file:
            file.write(line + "\n")


def run_here(text: str, cli: argparse.Namespace) -> bool:
    """One row in this process. False if it ran out of memory."""
    row, message = parse_row(text), ""
    for attempt in attempts(row, cli):
        began = time.perf_counter()
        clear()
        try:
            result = run(attempt, cli)
        except RuntimeError as error:
            message = str(error).partition("\n")[0][:300]
            if not any(sign in message for sign in OUT_OF_MEMORY_SIGNS):
                raise
            clear(error)
            if dist.is_initialized() and dist.get_world_size() > 1:
                break  # the other ranks wait in a collective
            continue
        if result is not None:
            write({**result, "seconds": round(time.perf_counter() - began, 1)}, cli)
        clear()
        return True
    write({"row": attempt, "shape": cli.shape, "out_of_memory": message}, cli)
    return False


def run_apart(text: str, cli: argparse.Namespace, seconds: float) -> None:
    """One row in processes of its own. A row that fails otherwise than for memory is reported here."""
    launch = [sys.executable]
    if cli.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cli.processes)]
    skipped = {"row", "processes", "row_timeout", "budget"}
    options = {name: value for name, value in vars(cli).items() if name not in skipped and value not in (None, False)}
    command = [*launch, __file__, "--here", "--row", text]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        command += [option] if value is True else [option, str(value)]
    before = cli.out.stat().st_size if cli.out is not None and cli.out.exists() else 0
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(seconds)
        problem = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()
        problem = f"stopped after {seconds:.0f} s"
    after = cli.out.stat().st_size if cli.out is not None and cli.out.exists() else 0
    if problem and after == before:  # a line of its own would say more
        write({"row": parse_row(text), "shape": cli.shape, "error": problem}, cli)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--per-device-train-batch-size", default="2", help="a number, or auto")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4)
    parser.add_argument("--samples-per-step", type=int, help="of each device, instead of gradient accumulation steps")
    parser.add_argument("--largest-batch", type=int, default=8, help="what auto begins with")
    parser.add_argument("--log-every", type=int, default=4, help="steps between two readings of the clock")
    parser.add_argument("--intervals", type=int, default=5, help="readings")
    parser.add_argument("--warmup", type=int, help="steps before the clock starts, as many as --log-every if not given")
    parser.add_argument("--row", action="append", help="fields of the training arguments, such as tp_size=2")
    parser.add_argument("--bf16", action="store_true", help="also without a GPU")
    parser.add_argument("--profile", action="store_true", help="trace one more interval: kernels, and what is hidden")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--processes", type=int, default=1, help="of each row, without torchrun")
    parser.add_argument("--row-timeout", type=float, default=600.0, help="seconds after which a row is stopped")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no row begins")
    parser.add_argument("--here", action="store_true", help="all rows in this process")
    cli = parser.parse_args()
    if cli.warmup is not None and (cli.warmup < cli.log_every or cli.warmup % cli.log_every):
        parser.error(f"--warmup {cli.warmup} is no multiple of --log-every {cli.log_every}: log lines are the clock")
    began = time.perf_counter()
    for text in cli.row or [""]:
        left = cli.budget - (time.perf_counter() - began)
        if not cli.here and "LOCAL_RANK" not in os.environ:
            if left < LEAST_SECONDS:
                write({"row": parse_row(text), "shape": cli.shape, "error": "not begun: the time is over"}, cli)
            else:
                run_apart(text, cli, min(cli.row_timeout, left))
        else:
            try:
                fits = run_here(text, cli)
            except Exception as error:
                if os.environ.get("RANK", "0") == "0":
                    problem = f"{type(error).__name__}: {error}"[:500]
                    write({"row": parse_row(text), "shape": cli.shape, "error": problem}, cli)
                raise
            if not fits and dist.is_initialized() and dist.get_world_size() > 1:
                os._exit(OUT_OF_MEMORY)  # the other ranks wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
