"""What a rank does, by the function that it is in, for tables of where ranks are."""

from __future__ import annotations

from collections.abc import Callable

from ..parallel.mesh import ParallelMesh
from ..parallel.run_watch import Limits, RunWatch
from ..training_args import NanotronTrainingArguments

_OWN = "hf_nanotron"
_TRAINER = f"{_OWN}.trainer"

# Module and function. The innermost of a stack counts.
PHASES: dict[tuple[str, str], str] = {
    (_TRAINER, "_prepare_for_training"): "start",
    (_TRAINER, "set_initial_training_values"): "start",
    (f"{_OWN}.monitor.health", "check_health"): "health check",
    (_TRAINER, "_load_from_checkpoint"): "resume",
    (_TRAINER, "_load_optimizer_and_scheduler"): "resume",
    (_TRAINER, "get_batch_samples"): "data",
    (_TRAINER, "_run_step"): "step",
    (f"{_OWN}.training.step.train_step", "run"): "step",
    (f"{_OWN}.models.stage", "forward"): "forward",
    (f"{_OWN}.parallel.pipeline.executor", "_received"): "forward",
    (f"{_OWN}.parallel.pipeline.executor", "_exchange"): "transfer",
    (f"{_OWN}.parallel.pipeline.executor", "finish"): "transfer",
    (f"{_OWN}.parallel.pipeline.executor", "take"): "transfer",
    ("torch.autograd", "backward"): "backward",
    (f"{_OWN}.parallel.zero.bucketed", "finish"): "reduce",
    (f"{_OWN}.parallel.zero.fully_sharded", "finish"): "reduce",
    (f"{_OWN}.optim.norm", "global_norm"): "gradient norm",
    (_TRAINER, "_clip_grad_norm"): "update",
    ("torch.optim.optimizer", "wrapper"): "update",
    (_TRAINER, "log"): "log",
    (_TRAINER, "_maybe_log_save_evaluate"): "log",
    (_TRAINER, "_save_checkpoint"): "save",
    (_TRAINER, "save_model"): "save",
    (_TRAINER, "evaluation_loop"): "evaluation",
    (_TRAINER, "_finalize_training"): "end",
    ("transformers.trainer_callback", "call_event"): "callback",
}

# Those of the step after the last that is done.
IN_STEP = frozenset(
    (
        "start",
        "health check",
        "resume",
        "data",
        "step",
        "forward",
        "transfer",
        "backward",
        "reduce",
        "gradient norm",
        "update",
    )
)


def watch_run(mesh: ParallelMesh, args: NanotronTrainingArguments, steps: Callable[[], int]) -> RunWatch:
    """Around what a rank does by these phases. `steps` says how many optimizer steps are done."""
    timeout = args.ddp_timeout if args.stall_timeout is None else args.stall_timeout
    limits = Limits(args.stall_warning, float(timeout))
    return RunWatch(mesh, limits, PHASES, lambda phase: steps() + (phase in IN_STEP))
