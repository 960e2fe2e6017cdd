"""Seconds from a launch to the first optimizer steps, with an empty cache of compiled code and with a full one.

    python startup.py --shape 1b --out startup.jsonl
    python startup.py --shape 1b --processes 2 --launcher "torchrun --virtual-local-rank"
    python startup.py --family qwen3_next --family gemma4 --runs cold

A run is a process group of its own (`torchrun`, or one process), in a cache folder that is empty before the first run
and kept for the next ones (`--runs cold,warm,warm`). `--family` takes the tiny config of a model type from
`tests/families*.json` in the place of a shape, and compiles it at `--sequence-length`.

Prints one JSON line for each run, of rank 0: seconds since the launch at which Python ran (`python`), the packages were
imported (`imports`), the process group was there (`arguments`), the model was made (`model`), the trainer was made
(`trainer`), and each optimizer step had ended on the device (`steps`); what compiling took of it (`compile`: torch's
own clocks, summed over the graphs), how many graphs came from the cache, and the slowest rank's first step.
"""

import time

STARTED = time.time()

import argparse  # noqa: E402  the clock is read before anything is imported
import json  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
FAMILIES = ("families.json", "families_unplanned.json")
CLOCKS = {
    "capture": "bytecode_tracing",
    "backend": "OutputGraph.call_user_compiler",
    "backward": "backward._backward_impl",
    "import": "inductor_import",
}
STEPS = 3


def config_of(cli: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    if cli.family:
        known = {name: row for file in FAMILIES for name, row in json.loads((TESTS / file).read_text()).items()}
        fields = dict(known[cli.family[0]]["config"])
        for name in ("max_position_embeddings", "n_positions"):
            if name in fields:
                fields[name] = max(fields[name], cli.sequence_length)
        return AutoConfig.for_model(cli.family[0], **fields)
    from shapes import make_config

    return make_config(cli.shape, cli.sequence_length)


def child(cli: argparse.Namespace) -> None:
    """One rank of one run."""
    marks = {"python": STARTED - cli.launched}

    def mark(name: str) -> None:
        marks[name] = time.time() - cli.launched

    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import compilation_time_metrics, counters
    from transformers import TrainerCallback, default_data_collator

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    mark("imports")
    gpu, steps = torch.cuda.is_available(), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            steps.append(round(time.time() - cli.launched, 2))

    with tempfile.TemporaryDirectory() as folder:
        args = NanotronTrainingArguments(
            output_dir=folder, max_steps=STEPS, save_strategy="no", report_to="none", bf16=gpu, use_cpu=not gpu,
            torch_compile=True if cli.compile else None, per_device_train_batch_size=1, disable_tqdm=True,
            zero_stage=1, logging_steps=1, **json.loads(cli.arguments),
        )  # fmt: skip
        mark("arguments")
        config = config_of(cli)
        model = AutoModelForCausalLM.from_config(config)
        mark("model")
        vocabulary = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, vocabulary, (64, cli.sequence_length), generator=generator)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = NanotronTrainer(model, args, train_dataset=rows, data_collator=default_data_collator)
        trainer.add_callback(Clock())
        mark("trainer")
        losses = trainer.train().training_loss
    slowest = torch.tensor(steps[0], device=trainer.mesh.device)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if trainer.mesh.rank:
        return
    seconds = {name: round(sum(compilation_time_metrics.get(key, [])), 2) for name, key in CLOCKS.items()}
    kept = {
        name: number
        for part in ("inductor", "aot_autograd")
        for name, number in counters[part].items()
        if "cache" in name
    }
    report = {
        "run": cli.named, "shape": (cli.family or [cli.shape])[0], "processes": cli.processes,
        "marks": {name: round(value, 2) for name, value in marks.items()}, "steps": steps,
        "slowest_first_step": round(float(slowest), 2), "compile": seconds, "cache": kept,
        "graphs": counters["stats"]["unique_graphs"], "loss": losses, "launcher": cli.launcher,
        "device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__,
    }  # fmt: skip
    print("REPORT " + json.dumps(report), flush=True)


def parent(cli: argparse.Namespace) -> None:
    for family in cli.family or [None]:
        cache = Path(tempfile.mkdtemp(prefix="startup-"))
        try:
            for name in cli.runs.split(","):
                report = one_run(cli, name, family, cache)
                print(json.dumps(report), flush=True)
                if cli.out is not None:
                    with cli.out.open("a") as file:
                        file.write(json.dumps(report) + "\n")
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def one_run(cli: argparse.Namespace, name: str, family: str | None, cache: Path) -> dict[str, Any]:
    """What rank 0 of a run reports; or how it ended, if it does not."""
    start = [sys.executable]
    if cli.processes > 1:
        command, *options = shlex.split(cli.launcher)
        module = ["-m", "torch.distributed.run"] if command == "torchrun" else [command]
        start += [*module, *options, "--standalone", f"--nproc-per-node={cli.processes}"]
    options = [
        __file__, "--shape", cli.shape, "--sequence-length", str(cli.sequence_length), "--named", name,
        "--processes", str(cli.processes), "--arguments", cli.arguments, f"--launcher={cli.launcher}",
        *(["--family", family] if family else []), *(["--compile"] if cli.compile else []),
        "--launched", repr(time.time()),
    ]  # fmt: skip
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    try:
        done = subprocess.run(
            [*start, *options], env={**os.environ, **folders}, capture_output=True, text=True, timeout=cli.limit
        )
    except subprocess.TimeoutExpired:
        return {"run": name, "shape": family or cli.shape, "failed": f"it took more than {cli.limit} s"}
    for line in done.stdout.splitlines():
        if line.startswith("REPORT "):
            return dict(json.loads(line.removeprefix("REPORT ")))
    return {"run": name, "shape": family or cli.shape, "failed": (done.stderr or done.stdout)[-1500:]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--family", action="append", help="a model type of tests/families.json")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--launcher", default="torchrun")
    parser.add_argument("--runs", default="cold,warm")
    parser.add_argument("--compile", action="store_true", help="also on a CPU, where it is not by default")
    parser.add_argument("--arguments", default="{}", help="JSON of further training arguments")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--named", help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    (parent if options.launched is None else child)(options)
