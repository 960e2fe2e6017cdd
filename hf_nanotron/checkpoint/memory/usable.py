"""Which snapshots a restart may go on from."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from ...parallel.mesh import ParallelMesh
from ...parallel.together import together
from ..directory.retention import from_rank_0, is_part, newest, run_at_hand, step_of
from ..directory.runs import Run
from .folder import MemoryFolder
from .hosts import Hosts
from .resume import Snapshot, find_snapshots

logger = logging.get_logger(__name__)


def usable_snapshots(mesh: ParallelMesh, hosts: Hosts, folder: MemoryFolder, output_dir: str) -> list[Snapshot]:
    """The whole snapshots of the run at hand in `output_dir`, the newest first. All ranks together."""
    at_hand = together(mesh, "looking for the run", lambda: run_at_hand(output_dir) if mesh.rank == 0 else None)
    said = from_rank_0(mesh, None if at_hand is None else at_hand.to_dict())
    run = None if said is None else Run.from_dict(said)
    usable = []
    for snapshot in find_snapshots(mesh, hosts, folder):
        if run is None or not run.has(snapshot.run, snapshot.step):
            why = "it is of another run than the one that was started last in output_dir"
        elif missing := snapshot.missing:
            why = f"the parts of ranks {_listed(missing)} are gone with their hosts, or were not complete"
        else:
            usable.append(snapshot)
            continue
        if mesh.rank == 0:
            logger.warning(f"The memory snapshot of step {snapshot.step} is not used: {why}.")
    return usable


def newest_step(output_dir: str) -> int:
    """Of the committed checkpoints of the run at hand, -1 if there is none."""
    run = run_at_hand(output_dir)
    return max((step_of(path.name) for path in newest(output_dir, run)), default=-1) if run is not None else -1


def lost_best(checkpoint: Path, run: Run) -> str | None:
    """Whether the best checkpoint of a snapshot was still being written when the run died."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    best = state.best_model_checkpoint
    if best is None or is_part(run, Path(best)):
        return None
    return f"its best checkpoint, {best}, was not complete, and load_best_model_at_end needs it"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
