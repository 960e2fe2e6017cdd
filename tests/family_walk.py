"""Every family through the whole Trainer in bf16, beside stock Trainer: the default, packed, recomputed and in FP8.

    python tests/family_walk.py --out walk.jsonl --workers 30          # all families, on the GPUs that are visible
    python tests/family_walk.py --out walk.jsonl --families llama jamba --modes default fp8
    python tests/family_walk.py --out walk.jsonl --summary --record    # what the file holds, for the documentation

A case is one family in one mode: four steps of a small model with the default arguments and `bf16=True`, which compiles
on a GPU. Stock Trainer takes the same steps in bf16 and in fp32, once for a family. Each case is one line of the file,
written when it is done; a case that the file holds is not run again. A worker that dies or takes longer than `--limit`
seconds is a case that failed, and the next one gets a new worker. The exit status is 1 if a case is not right.

Stock Trainer keeps the text model inside another, such as that of gemma3n, at `use_cache=True`. With a cache its packed
documents see each other; so here its `use_cache` is False, which gives the losses of each document alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODES = ("default", "packed", "fp8", "recompute")
STEPS, ROWS = 4, 2
DOCUMENTS = (37, 5, 49)  # tokens of each document of a packed row; other rows are one document of as many tokens
LENGTH = sum(DOCUMENTS)  # odd: no kernel gets what it would like best


@dataclass(frozen=True)
class Bounds:
    """How far a case may be from stock Trainer in fp32, besides `times` what stock's bf16 is.

    Twice in bf16: ours also rounds what stock's autocast keeps, such as the residual. Sixteen times in FP8, which
    keeps four bits of a number where bf16 keeps eight, so that its roundings are sixteen times as large.

    Some models lose much by any rounding: Gemma 4 does not scale the products of normed queries and keys, so that a new
    model's softmax is nearly a maximum; docs/families_on_gpus.md has figures.

    Args:
        loss: relative, the largest of all steps.
        gradient: of the first step, the norm of its error over its norm.
        weight: the same of one weight, relative to the norm of that weight's gradient and a hundredth of the whole.
    """

    loss: float
    gradient: float
    weight: float
    times: int


BF16 = Bounds(loss=0.01, gradient=0.02, weight=0.1, times=2)
UNKNOWN = {"gradient_error": 0.1, "weight_error": 0.1}  # taken for those of stock in bf16 where stock fails there
FP8 = replace(BF16, times=16)
BOUNDS = {"default": BF16, "packed": BF16, "fp8": FP8, "recompute": BF16}


# ---- sizes: those of tests/families.json are for CPUs. Heads of 64 features are what the kernels of GPUs take ----

FACTOR = 4
WIDER = re.compile(
    r"(\w*hidden_size\w*|d_model|n_embd|\w*intermediate_size\w*|ffn_dim|\w*ffn_hidden_size|n_inner|block_ff_dim"
    r"|(?!mamba_)\w*head_dim|\w+_lora_rank|\w+_rope_head_dim|\w+_nope_head_dim|rotary_dim|dim_model_base"
    r"|word_embed_proj_dim|query_pre_attn_scalar|moe_latent_size|ple_embed_dim|mamba_d_ssm|mamba_n_heads"
    r"|mamba_num_heads|\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|mrope_section)"
)
TOWERS = ("vision_config", "audio_config", "vq_config")  # which see no input here
SHARED = ("adapter_out_dim",)  # of a tower: the width of the text model


def wider(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config with `FACTOR` times the features, and as many layers, heads and experts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in TOWERS and value is not None:
            found[name] = {**value, **{one: _times(value[one]) for one in SHARED if one in value}}
        elif isinstance(value, dict):
            found[name] = wider(value)
        elif WIDER.fullmatch(name):
            found[name] = _times(value)
        else:
            found[name] = value
    return found


def _times(value: Any) -> Any:
    if isinstance(value, list):
        return [_times(one) for one in value]
    return value * FACTOR if isinstance(value, int) and not isinstance(value, bool) else value


# ---- one case, in a worker ----


@dataclass
class Figures:
    """Of the steps of one run: losses, and gradient norms before clipping. `gradient_error` and `weight_error` are of
    the first step, from stock in fp32.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradient_error: float = 0.0
    weight_error: float = 0.0
    worst_weight: str = ""
    seconds: float = 0.0
    first_step: float = 0.0


@dataclass
class Case:
    """A line of the file.

    Args:
        state: `"ok"`, `"off"` (too far from stock), `"refused"`, `"failed"` or `"no stock"` (stock Trainer fails).
        loss: largest relative difference of a loss from stock in fp32; `norm` that of the first gradient norm.
            `stock_loss` and `stock_norm` are those of stock in bf16.
        graphs: of `torch.compile`.
        figures: of this run; `stock`: by `"bf16"` and `"fp32"`.
    """

    family: str
    mode: str
    state: str
    reason: str = ""
    loss: float = 0.0
    norm: float = 0.0
    stock_loss: float = 0.0
    stock_norm: float = 0.0
    graphs: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def build(family: str) -> Any:
    """The stock model, the same in every process, with the attention that transformers chooses."""
    import torch
    from family_runs import KNOWN
    from transformers import AutoConfig, AutoModelForCausalLM

    values = wider(KNOWN[family]["config"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at zero or one, where a wrong gradient could hide
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def rows(family: str, packed: bool) -> Any:
    import torch
    from datasets import Dataset
    from family_runs import KNOWN

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (STEPS * ROWS, LENGTH), generator=generator).tolist()
    extra: dict[str, Any] = {}
    if packed:
        extra["position_ids"] = [place for length in DOCUMENTS for place in range(length)]
    if "token_type_ids" in KNOWN[family].get("inputs", ()):
        extra["token_type_ids"] = [0] * LENGTH
    # Nothing predicts the first token: with a label there, GPT-2's loss would be divided by one more than others.
    return Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]], **extra} for row in ids])


def train(
    family: str, trainer_class: Any, arguments_class: Any, packed: bool, **arguments: Any
) -> tuple[Figures, dict[str, Any]]:
    """`STEPS` steps under `arguments`, all others being default but for what would write files; and the gradient of
    each weight in the first, clipped, on the host.
    """
    import torch
    from transformers import Trainer, TrainerCallback, default_data_collator

    figures, gradients = Figures(), dict[str, torch.Tensor]()
    started = time.perf_counter()

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if gradients:
                return
            if hasattr(trainer, "gradients"):
                found = {name: gradient for name, _, gradient in trainer.gradients()}
            else:
                found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            gradients.update((name, one.detach().flatten().float().cpu().clone()) for name, one in found.items())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                figures.losses.append(float(logs["loss"]))
                figures.norms.append(float(logs["grad_norm"]))
                figures.first_step = figures.first_step or time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=7,
            **arguments,
        )
        trainer = trainer_class(
            model=build(family),
            args=args,
            train_dataset=rows(family, packed),
            data_collator=default_data_collator,
            callbacks=[Record()],
        )
        if trainer_class is Trainer:
            trainer.model.config.get_text_config().use_cache = False
        try:
            trainer.train()
        finally:
            mesh = getattr(trainer, "mesh", None)
            if mesh is not None:
                mesh.close()
    figures.seconds = time.perf_counter() - started
    return figures, gradients


def compare(figures: Figures, gradients: Mapping[str, Any], exact: Mapping[str, Any]) -> None:
    """Note in `figures` how far `gradients` are from `exact`. Tied weights have one name."""
    whole = sum(float(one.square().sum()) for one in exact.values()) ** 0.5
    squares = 0.0
    for name in (*exact, *(gradients.keys() - exact.keys())):  # stock: no gradient
        one, own = exact.get(name), gradients.get(name)
        if one is None:
            one = own * 0.0
        error = float((one if own is None else own - one).norm())
        squares += error**2
        relative = error / (float(one.norm()) + 0.01 * whole)
        if relative > figures.weight_error or math.isnan(relative):
            figures.weight_error, figures.worst_weight = relative, name
    figures.gradient_error = squares**0.5 / whole


def stock_figures(family: str, packed: bool, gradients: Path) -> dict[str, Any]:
    """Of stock Trainer in fp32, whose gradients are written to a file, and in bf16, if its model works there."""
    import torch
    from transformers import Trainer, TrainingArguments

    exact, of_exact = train(family, Trainer, TrainingArguments, packed)
    torch.save(of_exact, gradients)
    try:
        half, of_half = train(family, Trainer, TrainingArguments, packed, bf16=True)
    except RuntimeError:
        return {"fp32": asdict(exact)}
    compare(half, of_half, of_exact)
    return {"fp32": asdict(exact), "bf16": asdict(half)}


def own_arguments(mode: str, compile_backend: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"bf16": True}
    if compile_backend is not None:
        arguments |= {"torch_compile": True, "torch_compile_backend": compile_backend}
    if mode == "recompute":
        arguments["gradient_checkpointing"] = True
    if mode == "fp8":
        arguments["fp8"] = "tensorwise"
    return arguments


def run_case(
    family: str, mode: str, stock: dict[str, Any] | None, gradients: Path, compile_backend: str | None
) -> Case:
    """One case. `stock`: the figures that an earlier case of the family has found, if one has, with `gradients`."""
    import torch
    import transformers

    from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

    packed = mode == "packed"
    case = Case(family, mode, "failed")
    case.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        case.versions["device"] = torch.cuda.get_device_name()
    try:
        case.stock = stock if stock and gradients.exists() else stock_figures(family, packed, gradients)
    except Exception as error:  # whatever a model says of its own loss, shapes or packages
        case.state, case.reason = "no stock", _sentence(error)
        return case
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        arguments = own_arguments(mode, compile_backend)
        found, own = train(family, NanotronTrainer, NanotronTrainingArguments, packed, **arguments)
        compare(found, own, torch.load(gradients))
    except ValueError as error:
        case.state, case.reason = ("refused" if _is_refusal(error) else "failed"), _sentence(error)
        return case
    except Exception as error:
        case.reason = _sentence(error)
        return case
    case.figures, case.seconds = asdict(found), found.seconds
    case.graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return judged(case)


def judged(case: Case) -> Case:
    """`case` with its differences from stock, and whether they are within the bounds of its mode."""
    fp32, own, bounds = case.stock["fp32"], case.figures, BOUNDS[case.mode]
    bf16 = case.stock.get("bf16") or {**fp32, **UNKNOWN}
    case.loss, case.norm = _differences(own, fp32)
    case.stock_loss, case.stock_norm = _differences(bf16, fp32)
    wrong = [
        f"{what} {mine:.2%} from fp32 (stock {theirs:.2%})"
        for what, mine, theirs, bound in (
            ("loss", case.loss, case.stock_loss, bounds.loss),
            ("gradient", own["gradient_error"], bf16["gradient_error"], bounds.gradient),
            (f"gradient of {own['worst_weight']}", own["weight_error"], bf16["weight_error"], bounds.weight),
        )
        if not mine <= bound + bounds.times * theirs
    ]
    case.state, case.reason = ("off" if wrong else "ok"), "; ".join(wrong)
    return case


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Largest relative difference of the losses, and that of the first norm; infinite if a number is missing."""
    if len(one["losses"]) != STEPS or len(other["losses"]) != STEPS:
        return float("inf"), float("inf")
    if not all(map(math.isfinite, (*one["losses"], *one["norms"]))):
        return float("inf"), float("inf")
    losses = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(one["losses"], other["losses"], strict=True))
    return losses, abs(one["norms"][0] - other["norms"][0]) / max(other["norms"][0], 1e-6)


def _is_refusal(error: ValueError) -> bool:
    """Whether a sentence of ours says that a mode is not for a model; not any error of a wrong value."""
    return str(error).startswith(("fp8=", "activation_checkpointing", "gradient_checkpointing"))


def _sentence(error: BaseException) -> str:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename)
        if name.parts[-2:-1] and ("hf_nanotron" in name.parts or "models" in name.parts):
            frames.append(f"{name.parent.name}/{name.name}:{trace.tb_lineno}")
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" + (f" [{' > '.join(frames[-3:])}]" if frames else "")


def work(compile_backend: str | None) -> None:
    """Cases from stdin, one a line, and their rows to stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        case = run_case(job["family"], job["mode"], job["stock"], Path(job["gradients"]), compile_backend)
        gc.collect()
        answers.write(json.dumps(asdict(case)) + "\n")
        answers.flush()


# ---- the walk ----


class Worker:
    """A process that runs one case after another, until it dies or is too slow."""

    def __init__(self, number: int, gpus: int, options: list[str], logs: Path, waits: bool = False) -> None:
        self._log = (logs / f"worker{number}.log").open("a")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the workers are as many as the cores
            "TOKENIZERS_PARALLELISM": "false",
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",  # a kernel is compiled once, not in each worker
        }
        if waits:
            environment["CUDA_LAUNCH_BLOCKING"] = "1"
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *options]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.uses = 0

    def run(self, job: Mapping[str, Any], limit: float) -> dict[str, Any] | str:
        """The row of a case, or why there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self.uses += 1
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return "the process died before it began"
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            return f"it took more than {limit:.0f} s"
        line = self._process.stdout.readline()
        if not line:
            return f"the process died with exit status {self._process.wait()}: {self._last_words()}"
        row: dict[str, Any] = json.loads(line)
        return row

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines[-200:] if "Error" in line or "error" in line or "Fatal" in line]
        return said[-1][:300] if said else "nothing"


def walk(jobs: Iterable[tuple[str, str]], cli: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `jobs` in order on `cli.workers` workers and append their rows to `cli.out` as they come."""
    import torch

    gpus = torch.cuda.device_count()
    options = ["--compile", cli.compile] if cli.compile else []
    waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    found, lock = read(cli.out), threading.Lock()
    stock = {_reference(row["family"], row["mode"]): row["stock"] for row in found if row.get("stock")}
    for job in jobs:
        waiting.put(job)
    deadline = time.monotonic() + cli.seconds
    logs, dead = Path(tempfile.mkdtemp(prefix="family-walk-")), dict[tuple[str, str], str]()

    def serve(number: int) -> None:
        worker = None
        while time.monotonic() < deadline:
            try:
                family, mode = waiting.get_nowait()
            except queue.Empty:
                break
            if (family, mode) in dead and worker is not None:
                worker.close()
                worker = None
            worker = worker or Worker(number, gpus, options, logs, (family, mode) in dead)
            reference = _reference(family, mode)
            limit = min(cli.limit + (40 if worker.uses == 0 else 0), max(1.0, deadline - time.monotonic()))
            began = time.monotonic()
            gradients = str(logs / f"{family}-{reference[1]}.pt")
            row = worker.run(
                {"family": family, "mode": mode, "stock": stock.get(reference), "gradients": gradients}, limit
            )
            if isinstance(row, str):
                worker.close()
                worker = None
                job = (family, mode)
                if "died" in row and gpus and job not in dead:  # once more, where errors come at the call that fails
                    dead[job] = row
                    waiting.put(job)
                    continue
                if time.monotonic() >= deadline:
                    break  # the walk is over: nothing is known of this case
                row = asdict(Case(family, mode, "failed", row, seconds=time.monotonic() - began))
            elif (family, mode) in dead:
                row["reason"] = f"{row['reason']} (the process of the first try died: {dead[family, mode][-200:]})"
            with lock:
                if row["stock"]:
                    stock[reference] = row["stock"]
                found.append(row)
                with cli.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{len(found):4d} {line_of(row)}", flush=True)
            if row["state"] == "failed" and "CUDA" in row["reason"] and worker is not None:
                worker.close()  # an error of the device stays with its process
                worker = None
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(cli.workers)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return found


def _reference(family: str, mode: str) -> tuple[str, bool]:
    return family, mode == "packed"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line_of(row: Mapping[str, Any]) -> str:
    own, half = row["figures"], row["stock"].get("bf16") or {}
    figures = " ".join(
        f"{name} {own.get(name, 0.0):.2%} ({half.get(name, 0.0):.2%})" for name in ("gradient_error", "weight_error")
    )
    figures = f"loss {row['loss']:.2%} ({row['stock_loss']:.2%}) {figures} {row['graphs']} graphs"
    return f"{row['family']} {row['mode']} {row['state']} {row['reason'][:300] or figures} {row['seconds']:.0f} s"


def summary(found: list[dict[str, Any]]) -> str:
    """Counts of each mode, and the cases that are not right."""
    lines = []
    for mode in MODES:
        states = Counter(row["state"] for row in found if row["mode"] == mode)
        lines.append(f"{mode:10s} " + ", ".join(f"{number} {state}" for state, number in states.most_common()))
    wrong = [row for row in found if row["state"] in ("off", "failed")]
    return "\n".join([*lines, *(line_of(row) for row in wrong)])


# ---- what is kept of a walk, and the table of the documentation ----

RECORD = HERE / "data" / "family_walk.jsonl"
KEPT = ("family", "mode", "state", "reason", "loss", "stock_loss", "graphs", "seconds", "versions")
ERRORS = ("gradient_error", "weight_error")


def compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the single losses and norms."""

    def errors(figures: Mapping[str, Any]) -> dict[str, float]:
        return {name: round(figures[name], 5) for name in ERRORS if name in figures}

    kept = {name: round(row[name], 5) if isinstance(row[name], float) else row[name] for name in KEPT}
    return {**kept, "figures": errors(row["figures"]), "stock": {"bf16": errors(row["stock"].get("bf16", {}))}}


def record(found: Iterable[Mapping[str, Any]], path: Path = RECORD) -> None:
    """Write the rows of a walk, by family and mode; those of `path` that it has not run stay."""
    rows_of = {(row["family"], row["mode"]): row for row in [*read(path), *map(compact, found)]}
    path.write_text("".join(json.dumps(rows_of[key]) + "\n" for key in sorted(rows_of)))


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """Counts, and a line for each family, in Markdown."""
    by_family: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in found:
        by_family.setdefault(row["family"], {})[row["mode"]] = row
    reasons: dict[str, int] = {}
    counts = [
        f"{mode:10s} " + ", ".join(f"{count} {state}" for state, count in states.most_common())
        for mode in MODES
        if (states := Counter(modes[mode]["state"] for modes in by_family.values() if mode in modes))
    ]
    lines = [
        "```text",
        *counts,
        "```",
        "",
        f"| family | stock | {' | '.join(MODES)} |",
        "|---|---|" + "---|" * len(MODES),
    ]
    for family, modes in by_family.items():
        half = next((row["stock"]["bf16"] for row in modes.values() if row["stock"].get("bf16")), {})
        ran = any(row["state"] in ("ok", "off") for row in modes.values())
        stock = f"{half['gradient_error']:.1%}" if half else "fails" if ran else ""
        lines.append(f"| `{family}` | {stock} | {' | '.join(_cell(modes.get(mode), reasons) for mode in MODES)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def _cell(row: Mapping[str, Any] | None, reasons: dict[str, int]) -> str:
    if row is None:
        return "not run"
    if row["state"] == "ok":
        return f"{row['figures']['gradient_error']:.1%}"
    reason = re.sub(r" \[[^]]*\]$", "", row["reason"])
    return f"{row['state']} ({reasons.setdefault(reason, len(reasons) + 1)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("walk.jsonl"))
    parser.add_argument("--families", nargs="+", help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of one case")
    parser.add_argument("--seconds", type=float, default=1e9, help="of all; later cases wait for another call")
    parser.add_argument("--compile", help="backend of torch.compile, where it is not the default (on a CPU)")
    parser.add_argument("--again", nargs="*", help="run these states of the file again, such as: failed off")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}, of which the page is made")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    cli = parser.parse_args()
    if cli.worker:
        work(cli.compile)
        return
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if cli.again:
        kept = [row for row in read(cli.out) if row["state"] not in cli.again]
        cli.out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    found = read(cli.out)
    if not cli.summary:
        from family_runs import KNOWN

        done = {(row["family"], row["mode"]) for row in found}
        families = cli.families or list(KNOWN)
        if unknown := [family for family in families if family not in KNOWN]:
            parser.error(f"--families {' '.join(unknown)}: no tested family of this transformers")
        jobs = [(family, mode) for mode in cli.modes for family in families if (family, mode) not in done]
        found = walk(jobs, cli)
    print(summary(found))
    if cli.record:
        record(found)
    sys.exit(any(row["state"] in ("off", "failed") for row in found))


if __name__ == "__main__":
    main()
