"""torchtitan's own Trainer on one of our shapes and random tokens.

Its model, `parallelize_llama`, compiled blocks and loss, fused AdamW, clipping and loop are used as they are; only the
shape, the data and the reading of the clock are ours. On one GPU it trains fp32 weights under bf16 autocast, on several
it shards them by `fully_shard` with bf16 parameters and fp32 reduction. Works with torchtitan 0.2.2 on torch 2.11.

Fields of a row: `per_device_train_batch_size`, `gradient_accumulation_steps`, `torch_compile` (blocks and loss; true
if not named), `tp_size`, `cp_size` (torch's context parallelism), `activation_checkpointing` (`none`, `selective` or
`full`).
"""

import dataclasses
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clock import Watch

FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps", "torch_compile", "tp_size")
FIELDS += (
    "cp_size",
    "activation_checkpointing",
)


def as_in_one_process() -> None:
    """What torchrun would have told a single process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def model_fields(config: Any, sequence_length: int) -> dict[str, Any]:
    """The fields of torchtitan's `TransformerModelArgs` for a `LlamaConfig`.

    It derives the inner size of its MLP, as `multiple_of * ceil(int(factor * int(8 * dim / 3)) / multiple_of)`; the
    factor and the multiple here give ours.

    Raises:
        ValueError: the config is no plain Llama.
    """
    plain = config.hidden_size // config.num_attention_heads
    if config.model_type != "llama" or (config.head_dim or plain) != plain:
        raise ValueError(
            f"trainer=torchtitan on model_type={config.model_type!r}, head_dim={getattr(config, 'head_dim', None)}: "
            f"only Llama shapes whose heads have hidden_size / num_attention_heads = {plain} features are written down."
        )
    inner = config.intermediate_size
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": inner,
        "ffn_dim_multiplier": min(1.0, inner / int(8 * config.hidden_size / 3)),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": sequence_length,
    }


class RandomTokens:
    """A dataloader of torchtitan's kind: `({"input": ids}, labels)` without end, on the host; labels are shifted.

    No batch comes twice, as in the other rows.
    """

    def __init__(self, vocabulary: int, batch: int, sequence_length: int, seed: int) -> None:
        self.vocabulary, self.size = vocabulary, (batch, sequence_length + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            ids = torch.randint(0, self.vocabulary, self.size, generator=self.generator)
            yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


def job_config(row: dict[str, Any], sequence_length: int, steps: int, directory: Path) -> Any:
    """torchtitan's settings for a row.

    Raises:
        ValueError: a field that a torchtitan row does not know.
    """
    from torchtitan.config import JobConfig

    unknown = sorted(set(row) - set(FIELDS))
    if unknown:
        raise ValueError(f"trainer=torchtitan does not know {', '.join(unknown)}; it knows {', '.join(FIELDS)}.")
    world, tp, cp = int(os.environ["WORLD_SIZE"]), row.get("tp_size", 1), row.get("cp_size", 1)
    micro_batch, micro_batches = row.get(FIELDS[0], 1), row.get(FIELDS[1], 1)
    job = JobConfig()
    job.job.dump_folder = str(directory)
    job.model.flavor = "shape"
    job.training.local_batch_size, job.training.seq_len, job.training.steps = micro_batch, sequence_length, steps
    job.training.global_batch_size = micro_batch * micro_batches * (world // (tp * cp))
    job.optimizer.lr, job.lr_scheduler.warmup_steps = 3e-4, 0
    job.parallelism.tensor_parallel_degree, job.parallelism.context_parallel_degree = tp, cp
    job.compile.enable = row.get("torch_compile", True)
    job.compile.components = ["model", "loss"]
    job.activation_checkpoint.mode = row.get("activation_checkpointing", "none")
    job.metrics.log_freq = steps
    return job


def train(row: dict[str, Any], config: Any, sequence_length: int, watch: Watch, directory: Path) -> dict[str, Any]:
    """Train `watch.steps` steps; the fields of an `Outcome`.

    Raises:
        ValueError: torchtitan is missing, or a process group exists already: its Trainer makes its own.
    """
    if dist.is_initialized():
        raise ValueError("trainer=torchtitan makes its own process group: let its row have processes of its own.")
    as_in_one_process()
    try:
        from torchtitan.components.metrics import MetricsProcessor
        from torchtitan.models.llama3 import Transformer, TransformerModelArgs, get_train_spec
        from torchtitan.protocols.train_spec import register_train_spec
        from torchtitan.train import Trainer
    except ImportError as error:
        raise ValueError(f"trainer=torchtitan needs torchtitan 0.2.2 and what it imports: {error}.") from error

    # One embedding for both ends, as the config says. `fully_shard` puts them in two groups, which forbids that.
    tied = bool(config.tie_word_embeddings) and int(os.environ["WORLD_SIZE"]) == 1

    class Model(Transformer):
        def __init__(self, model_args: Any) -> None:
            super().__init__(model_args)
            if tied:
                self.output.weight = self.tok_embeddings.weight

        def init_weights(self, buffer_device: torch.device | None = None) -> None:
            if tied:  # memory was given to each
                self.output.weight = self.tok_embeddings.weight
            super().init_weights(buffer_device)

    class Metrics(MetricsProcessor):
        def log(self, step: int, global_avg_loss: float, *args: Any, **kwargs: Any) -> None:
            watch.losses.append(float(global_avg_loss))
            super().log(step, global_avg_loss, *args, **kwargs)

    peaks = [0]  # its log lines begin to count anew

    class Watched(Trainer):
        def train_step(self, data_iterator: Any) -> None:
            super().train_step(data_iterator)
            if torch.cuda.is_available():
                peaks.append(torch.cuda.max_memory_allocated())
            watch.mark(profile=dist.get_rank() == 0)

    def loader(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> RandomTokens:
        return RandomTokens(config.vocab_size, job_config.training.local_batch_size, sequence_length, dp_rank)

    spec = dataclasses.replace(
        get_train_spec(),
        model_cls=Model,
        model_args={"shape": TransformerModelArgs(**model_fields(config, sequence_length))},
        build_tokenizer_fn=None,
        build_dataloader_fn=loader,
        build_validator_fn=None,
        build_metrics_processor_fn=Metrics,
        state_dict_adapter=None,
    )
    job = job_config(row, sequence_length, watch.steps, directory)
    job.model.name = f"benchmark-{directory.name}"  # a name is taken for good
    register_train_spec(job.model.name, spec)
    try:
        trainer = Watched(job)
        trainer.train()
        outcome = {
            "world_size": dist.get_world_size(),
            "sizes": {"tp": row.get("tp_size", 1), "pp": 1, "ep": 1, "cp": row.get("cp_size", 1)},
            "micro_batch": job.training.local_batch_size,
            "micro_batches": trainer.gradient_accumulation_steps,
            "main": dist.get_rank() == 0,
            "shards": dist.get_world_size(),
            "notes": {
                "tied": tied,
                "built_parameters": built_parameters(trainer.model_parts[0]),
                "peak_memory_gib": round(max(peaks) / 2**30, 2),
            },
        }
        trainer.close()
    finally:  # also for a smaller micro-batch after one that was out of memory
        gc.enable()  # its Trainer collects by its own clock
        if dist.is_initialized():
            dist.destroy_process_group()
    return outcome


def built_parameters(model: torch.nn.Module) -> int:
    """Elements of all parameters, whole ones if they are sharded."""
    return sum(weight.numel() for weight in model.parameters())
