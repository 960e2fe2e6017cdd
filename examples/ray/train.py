"""A tensor-parallel run inside Ray Train: `python train.py --workers 2 --tp-size 2`. Ray is told of its checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

VOCABULARY = 64


def rows(count: int, length: int = 32) -> list[dict[str, list[int]]]:
    """Numbers in order, from different starts: something that a small model learns soon."""
    ids = [[(7 * start + place) % VOCABULARY for place in range(length)] for start in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def train(config: dict[str, Any], callbacks: tuple[Any, ...] = ()) -> list[float]:
    """One rank of the run, as in a script for torchrun; the losses. A process group may be open already."""
    from datasets import Dataset
    from transformers import AutoConfig, set_seed

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(
        output_dir=config["output_dir"],
        tp_size=config["tp_size"],
        max_steps=config["steps"],
        save_steps=config["steps"] // 2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=config["cpu"],
        bf16=not config["cpu"],
        disable_tqdm=True,
        report_to="none",
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    set_seed(args.seed)
    llama = AutoConfig.for_model("llama", vocab_size=VOCABULARY, num_key_value_heads=4, **sizes)
    trainer = NanotronTrainer(
        model=AutoModelForCausalLM.from_config(llama, parallel=args.parallel),
        args=args,
        train_dataset=Dataset.from_list(rows(256)),
        callbacks=list(callbacks),
    )
    # A worker group that Ray starts anew goes on from the newest checkpoint.
    trainer.train(resume_from_checkpoint="auto")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loop(config: dict[str, Any]) -> None:
    """What each worker of Ray runs."""
    import ray.train
    from ray.train.huggingface.transformers import RayTrainReportCallback

    losses = train(config, (RayTrainReportCallback(),))
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["output_dir"], "losses.json").write_text(json.dumps(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("out"), help="on a disk that all workers share")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker, instead of the CPU")
    args = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out = args.output_dir.absolute()
    config = {"output_dir": str(out), "tp_size": args.tp_size, "steps": args.steps, "cpu": not args.gpu}
    result = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if args.gpu else "gloo"),
        # On the CPU less than a core each: Ray's own actors need some, too.
        scaling_config=ScalingConfig(
            num_workers=args.workers, use_gpu=args.gpu, resources_per_worker=None if args.gpu else {"CPU": 0.5}
        ),
        run_config=RunConfig(name="ray", storage_path=str(out / "ray"), failure_config=FailureConfig(max_failures=0)),
    ).fit()
    print(f"loss {result.metrics['loss']:.3f} after {args.steps} steps; checkpoints: {out}")


if __name__ == "__main__":
    main()
