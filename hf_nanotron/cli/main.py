"""The `hf-nanotron` command: train, generate, plan, launch, check, convert, tokenize and others.

A sub-command imports torch when it runs, so that `--help` answers at once. Any of them runs sharded under torchrun:

    torchrun --nproc-per-node 4 -m hf_nanotron.cli generate MODEL --prompt "Once" --tp-size 2 --pp-size 2
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..convert.arguments import CONVERSIONS, add_arguments
from ..version import __version__
from .average import DESCRIPTION as AVERAGE, add_average_arguments
from .bench import DESCRIPTION as BENCH, add_bench_arguments
from .check import DESCRIPTION as CHECK, add_check_arguments
from .coordinate_check import DESCRIPTION as COORDINATES, add_coordinate_arguments
from .errors import (
    INTERRUPTED,
    STATUS,
    Parser,
    existing_model,
    explained,
    is_for_the_user,
    process_group,
    report,
    report_interrupt,
)
from .inspect import add_inspect_arguments
from .launch import DESCRIPTION as LAUNCH, add_launch_arguments
from .plan import DESCRIPTION as PLAN, add_plan_arguments
from .plot import DESCRIPTION as PLOT, add_plot_arguments
from .tokenize import DESCRIPTION as TOKENIZE, add_tokenize_arguments
from .top import DESCRIPTION as TOP, add_top_arguments
from .torchrun import DESCRIPTION as TORCHRUN, add_torchrun_arguments
from .upload import add_upload_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: `sys.argv`). Exits with status 2 after an error that the user can fix."""
    parser = build_parser()
    args = parse(parser, argv)
    had_group = process_group() is not None
    try:
        with explained(args.explains) if args.explains and not args.traceback else contextlib.nullcontext():
            args.run(args)
    except KeyboardInterrupt:
        if args.traceback:
            raise
        report_interrupt(parser.prog)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if args.traceback or not is_for_the_user(error):
            raise
        report(parser.prog, error)
        sys.exit(STATUS)
    group = process_group()
    if group is not None and not had_group:
        group.destroy_process_group()


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. What `launch` does not know are keys of its run, as `train` takes them."""
    args, others = parser.parse_known_args(argv)
    if getattr(args, "takes_keys", False):
        args.overrides = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command. Parsed arguments have a function `run`, which takes them."""
    parser = Parser(
        prog="hf-nanotron",
        description="Parallel pretraining behind the transformers Trainer. Run a command under torchrun to shard it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(explains=None)
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_train(commands)
    add_launch_arguments(_add_command(commands, "launch", "train on several nodes: Slurm, HF Jobs, SkyPilot", LAUNCH))
    add_torchrun_arguments(
        _add_command(commands, "torchrun", "torchrun, whose processes need not import torch", TORCHRUN, takes_all=True)
    )
    _add_convert(commands)
    add_check_arguments(_add_command(commands, "check", "compare a run's layout with one process", CHECK))
    add_coordinate_arguments(
        _add_command(commands, "coordinate-check", "measure whether a learning rate fits every width", COORDINATES)
    )
    add_tokenize_arguments(
        _add_command(commands, "tokenize", "tokenize a corpus into files for TokenDataset", TOKENIZE)
    )
    _add_data(commands)
    add_average_arguments(
        _add_command(commands, "average", "average the weights of Hub repositories of one model", AVERAGE)
    )
    add_plot_arguments(_add_command(commands, "plot", "draw loss, learning rate and throughput of runs", PLOT))
    add_top_arguments(_add_command(commands, "top", "show a running job in the terminal, from its own log", TOP))
    add_plan_arguments(_add_command(commands, "plan", "say what a run costs, and find its best layout", PLAN))
    add_bench_arguments(_add_command(commands, "bench", "measure how fast this machine is, for plans", BENCH))
    add_upload_arguments(_add_command(commands, "upload", "upload the checkpoints of a run to its remote store"))
    return parser


def _add_command(
    commands: Any, name: str, summary: str, description: str | None = None, takes_all: bool = False
) -> argparse.ArgumentParser:
    """`takes_all`: what begins with a dash is no option of ours either."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not takes_all,
        prefix_chars="\0" if takes_all else "-",
    )
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands, "generate", "generate text from prompts, with the model sharded over the processes of the job"
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id, or folder with a model and its tokenizer")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="prompt to continue; repeat for several"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="ranks that shard every layer (tensor parallelism)"
    )
    parser.add_argument(
        "--pp-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the stack of layers (pipeline parallelism)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights (default: as in the checkpoint)",
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--do-sample", action="store_true", help="sample instead of greedy decoding")
    sampling.add_argument("--temperature", type=float, metavar="T", help="sampling temperature (default: the model's)")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="nucleus sampling probability (default: the model's)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="random seed (default: a new random seed for each run)")
    parser.set_defaults(run=_generate)


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "pretrain from scratch or from existing weights, as described in a YAML file",
        """\
Pretrain from scratch or from existing weights, as described in a YAML file:

  model:                     # weights from the Hub or a folder, or a config for random weights
    name_or_path: HuggingFaceTB/SmolLM2-1.7B
    # config: {model_type: llama, hidden_size: 512, num_hidden_layers: 8, ...}
  tokenizer: HuggingFaceTB/SmolLM2-1.7B
  dataset:
    path: corpus.jsonl       # or a folder of save_to_disk, or anything datasets.load_dataset takes
    text_column: text        # is tokenized and packed; omit it if the dataset has input_ids
    sequence_length: 2048
    eval_split: test         # omit it for no evaluation
  training:                  # fields of NanotronTrainingArguments
    output_dir: out
    max_steps: 1000
    tp_size: 2

Instead of path, the section dataset takes tokens (files of token ids), chat (conversations), mixture (sets by
weights) or stages (data that change in the run), and eval (sets to evaluate on).

Other keys: model.config_overrides, model.revision, model.dtype, model.attn_implementation, dataset.name,
dataset.data_files, dataset.train_split, dataset.num_proc.""",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value",
        help="override a field of training (--max_steps 10) or any key (--model.name_or_path PATH)",
    )
    parser.set_defaults(run=_train, print_help=parser.print_help)


def _add_convert(commands: Any) -> None:
    parser = _add_command(
        commands, "convert", "convert between Hub repositories and training states or huggingface/nanotron checkpoints"
    )
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)
    for direction, conversion in CONVERSIONS.items():
        chosen = _add_command(directions, direction, conversion.summary)
        chosen.set_defaults(explains=f"the {conversion.what} cannot be converted")
        add_arguments(chosen, direction)


def _add_data(commands: Any) -> None:
    parser = _add_command(commands, "data", "look into tokenized corpora")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add_inspect_arguments(_add_command(actions, "inspect", "show what is in files of tokens, without reading them"))


def _generate(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState
    from transformers import AutoTokenizer, set_seed

    from ..models.auto import AutoModelForCausalLM
    from ..parallel.config import ParallelConfig

    for name in ("temperature", "top_p", "seed"):
        if getattr(args, name) is not None and not args.do_sample:
            raise ValueError(f"--{name.replace('_', '-')} needs --do-sample: greedy decoding does not sample.")
    for name, is_right, says in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature is None or 0 < args.temperature < math.inf, "above 0"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", args.seed is None or 0 <= args.seed < 2**32, "at least 0 and below 2**32"),
    ):
        if not is_right:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {says}.")
    args.model = existing_model("MODEL", args.model)
    parallel = ParallelConfig(tp_size=args.tp_size, pp_size=args.pp_size)
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    if (copies := parallel.dp_size(state.num_processes)) > 1:
        raise ValueError(
            f"{state.num_processes} processes with tp_size={args.tp_size} x pp_size={args.pp_size} would hold {copies} "
            f"replicas of the model and generate the same text; start {parallel.model_parallel_size}, or raise a size."
        )
    with explained(f"the tokenizer of {args.model!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None and len(args.prompt) > 1:
            raise ValueError(f"the tokenizer of {args.model} has no padding token; give one --prompt at a time.")
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(args.prompt, padding=len(args.prompt) > 1, return_tensors="pt")
    if not inputs["attention_mask"].any(dim=1).all():
        raise ValueError("a --prompt is empty; give it some text.")

    with explained(f"the model {args.model!r} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(args.model, parallel=parallel, dtype=args.dtype)
    options: dict[str, Any] = {"temperature": args.temperature, "top_p": args.top_p}
    if args.do_sample:
        # A generation setting of None is none at all, where leaving it out means the model's own.
        options = {name: value for name, value in options.items() if value is not None}
        # torch starts every process at the same seed, which would draw the same text each time.
        set_seed(args.seed if args.seed is not None else torch.seed() % 2**32)
    else:
        options["top_k"] = None
    tokens = model.generate(
        input_ids=inputs["input_ids"].to(model.mesh.device),
        attention_mask=inputs["attention_mask"].to(model.mesh.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    if state.is_main_process:
        for prompt, text in zip(args.prompt, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            if len(args.prompt) > 1:
                print(f"--- {prompt!r}")
            print(text, flush=True)


def _train(args: argparse.Namespace) -> None:
    if {"-h", "--help"} & set(args.overrides):
        args.print_help()
        return
    from .train import train

    train(args.config, args.overrides)
