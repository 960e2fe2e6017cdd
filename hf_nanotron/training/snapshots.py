"""Snapshots of a run in the memory of its hosts: taken every few steps, and taken up by a restart before the disk."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.utils import logging

from ..checkpoint.directory.host_copies import HostCopies
from ..checkpoint.directory.retention import from_rank_0, is_checkpoint_name, step_of
from ..checkpoint.directory.runs import Run
from ..checkpoint.directory.save import Save
from ..checkpoint.hub.sharded_model import held_buffers
from ..checkpoint.memory.folder import MemoryFolder, snapshot_name
from ..checkpoint.memory.hosts import Hosts, find_hosts
from ..checkpoint.memory.resume import Snapshot, make_checkpoint
from ..checkpoint.memory.room import check_room
from ..checkpoint.memory.threads import SnapshotThreads, write_snapshot
from ..checkpoint.memory.transfer import Wire
from ..checkpoint.memory.usable import lost_best, newest_step, usable_snapshots
from ..checkpoint.memory.wires import connect
from ..checkpoint.state.slices import Slice
from ..checkpoint.state.training_state import DIRECTORY, own_slice
from ..models.base import ParallelModel
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import refuse_together, together
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments
from .beginnings import is_auto
from .data_order import DataOrder
from .host_memory import state_bytes, warn_of_unpinned

logger = logging.get_logger(__name__)


class MemorySnapshots:
    """The snapshots of a trainer's runs, with `memory_snapshot_steps`; without it nothing happens and nothing is asked.

    A snapshot is copied to memory of the process while the next step computes (`hold`); a thread writes it into shared
    memory, and other threads exchange copies with the neighbouring hosts. The snapshot before is deleted when the next
    begins and all ranks know that this one is whole, so that at any time one is.

    Attributes:
        mesh, model, weights: of the model at hand; given by the trainer.
    """

    mesh: ParallelMesh
    model: ParallelModel
    weights: ShardedWeights

    def __init__(self, args: NanotronTrainingArguments) -> None:
        self.args = args
        self._copies: HostCopies | None = None
        self._expected = 0  # bytes of this rank's part
        self._folder: MemoryFolder | None = None
        self._hosts: Hosts | None = None
        self._wires: dict[int, Wire] = {}
        self._wired_mesh: ParallelMesh | None = None
        self._whole = ""  # the name of the newest snapshot that all ranks know to be whole
        self._taken_at = self._held_back = -1  # steps
        self._writing: SnapshotThreads | None = None
        self._is_first = True  # of this run, the next snapshot

    @property
    def is_on(self) -> bool:
        return self.args.memory_snapshot_steps is not None

    # ---- a run ----

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a run. Its snapshots are deleted when it ends well; after a failure they stay for the next start."""
        if not self.is_on:
            yield
            return
        if self._writing is not None:  # of a run that was broken off in this process
            self._writing.wait_for_own()
            self._writing = None
        mesh, folder = self.mesh, MemoryFolder(self.args.memory_snapshot_dir, cast(str, self.args.output_dir))
        self._refuse(folder.check)
        hosts = find_hosts(mesh, folder.root)
        self._refuse(lambda: _in_use(folder) if hosts.is_leader else None)
        self._folder, self._hosts, self._whole = folder, hosts, ""
        self._taken_at = self._held_back = -1
        self._is_first = True
        try:
            yield
            self._settle()
            together(mesh, "deleting the memory snapshots", lambda: folder.delete() if hosts.is_leader else None)
        finally:
            if self._writing is not None:  # the run has failed
                atexit.register(self._writing.leave)
            self.hold()
            self._copies = None  # what is still written has them
            folder.release()
            self._folder = self._hosts = None

    def _refuse(self, action: Callable[[], str | None]) -> None:
        """`action` on every rank; what it returns or raises as ValueError is raised on all."""

        def message() -> str | None:
            try:
                return action()
            except ValueError as error:
                return str(error)

        refuse_together(self.mesh, together(self.mesh, "making room for memory snapshots", message))

    def warn_of_restarts(self, resume_from_checkpoint: str | bool | None) -> None:
        """Where torchrun would start the ranks anew, and they would not go on from a snapshot."""
        goes_on = resume_from_checkpoint is True or is_auto(resume_from_checkpoint)
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        if self.is_on and self.mesh.rank == 0 and restarts != "0" and not goes_on:
            logger.warning(
                f"memory_snapshot_steps={self.args.memory_snapshot_steps}, but after a failure torchrun starts the "
                f"ranks again with resume_from_checkpoint={resume_from_checkpoint!r}, which looks at no snapshot; set "
                "resume_from_checkpoint='auto'."
            )

    # ---- taking up ----

    def holds(self, source: str | None) -> bool:
        """Whether a checkpoint was made of a snapshot."""
        return source is not None and self._folder is not None and Path(source).parent == self._folder.path

    def choose(self, on_disk: Callable[[], str | None]) -> str | None:
        """The checkpoint to go on from: made of the newest snapshot, unless what `on_disk` finds is newer.

        The disk is asked for what it has only if its newest checkpoint is newer, or no snapshot can be used.
        """
        if self._folder is None or self._hosts is None:
            return on_disk()
        mesh, output_dir = self.mesh, cast(str, self.args.output_dir)
        snapshots = usable_snapshots(mesh, self._hosts, self._folder, output_dir)
        if not snapshots:
            return on_disk()
        what, is_first = "looking for checkpoints", mesh.rank == 0
        newest_on_disk = together(mesh, what, lambda: newest_step(output_dir) if is_first else -1)
        newest_on_disk = from_rank_0(mesh, newest_on_disk)
        chosen: str | None = None
        if newest_on_disk > snapshots[0].step:
            with contextlib.suppress(ValueError):  # on all ranks: it is damaged, and there is no other
                chosen = on_disk()
            newest_on_disk = step_of(Path(chosen).name) if chosen and is_checkpoint_name(Path(chosen).name) else -1
        began = time.monotonic()
        for snapshot in snapshots:
            if snapshot.step < newest_on_disk:
                break
            try:
                source = self._take_up(snapshot)
            except ValueError as error:
                if mesh.rank == 0:
                    logger.warning(f"The memory snapshot of step {snapshot.step} is not used: {error}")
                continue
            self._whole = snapshot.name
            if mesh.rank == 0:
                said = "none" if newest_on_disk < 0 else f"of step {newest_on_disk}"
                logger.warning(
                    f"Going on from the memory snapshot of step {snapshot.step} (ready after "
                    f"{time.monotonic() - began:.1f} s); the newest checkpoint on disk: {said}."
                )
            return source
        return on_disk() if chosen is None else chosen

    def _take_up(self, snapshot: Snapshot) -> str:
        assert self._folder is not None and self._hosts is not None
        wanted = [own_slice(segment) for segment in self.weights.segments]
        wanted += [Slice.whole(name, tuple(buffer.shape)) for name, buffer in held_buffers(self.model).items()]
        path = make_checkpoint(self.mesh, self._hosts, self._folder, snapshot, wanted)
        if self.args.load_best_model_at_end:
            what, is_first = "looking for the best checkpoint", self.mesh.rank == 0
            lost = together(self.mesh, what, lambda: lost_best(path, snapshot.run) if is_first else None)
            refuse_together(self.mesh, lost)
        return str(path)

    # ---- taking ----

    def reserve(self, optimizer: torch.optim.Optimizer, average: WeightAverage | None, awaited: int) -> None:
        """Refuse snapshots that will not fit, before the first step; get the memory for copies. All ranks together.

        Args:
            awaited: bytes of memory that this process is about to get for something else.

        Raises:
            ValueError: on every rank; also for frozen weights, which a snapshot would lack.
        """
        if not self.is_on or self._folder is None or self._hosts is None:
            return
        frozen = _frozen(self.model, self.weights)  # of the layers that this rank has
        refuse_together(
            self.mesh,
            f"memory_snapshot_steps={self.args.memory_snapshot_steps} with {len(frozen)} frozen parameters "
            f"({frozen[0]}, ...): they are in the Hub files of checkpoints only, which a snapshot does not have; "
            "leave memory_snapshot_steps out."
            if frozen
            else None,
        )
        buffers = sum(buffer.nbytes for buffer in held_buffers(self.model).values())
        self._expected = size = state_bytes(self.weights, optimizer, average, self.mesh) + buffers
        check_room(self.mesh, self._hosts, self._folder, size, size + awaited)
        if self._copies is None or self._copies.device != self.mesh.device:
            self._copies = HostCopies(self.mesh.device)
        self._copies.reserve(size)
        together(self.mesh, "connecting neighbouring hosts for memory snapshots", self._connect)

    def is_due(self, state: TrainerState, control: TrainerControl, data_order: DataOrder) -> bool:
        """Whether to take a snapshot now, after what Trainer does at the end of a step or of an epoch.

        One that is due with the last step of an epoch waits for the end of that epoch, whose evaluation and save a
        restart would leave out otherwise.
        """
        every, step = self.args.memory_snapshot_steps, state.global_step
        if every is None or step % every or step in (0, self._taken_at):
            return False
        if control.should_training_stop or step >= state.max_steps:
            return False
        if self._held_back != step and (control.should_epoch_stop or data_order.is_at_end_of_epoch):
            self._held_back = step
            return False
        return True

    def take(self, run: Run, step: int, write_own: Callable[[Save], None]) -> None:
        """Copy the state of the run, and have it written. All ranks together.

        Args:
            write_own: writes the small files of this rank, and gives the `Save` its part of the training state.
        """
        folder, hosts = self._folder, self._hosts
        assert folder is not None and hosts is not None
        self._settle()
        self._taken_at, name = step, snapshot_name(run, step)
        threads = self._writing = SnapshotThreads(name, self.mesh.rank, folder)

        def make_place() -> None:
            with threads.noting_failure(OSError):
                if hosts.is_leader:
                    folder.keep([self._whole])
                    (folder.snapshot(name) / DIRECTORY).mkdir(mode=0o700, parents=True)

        together(self.mesh, f"beginning the memory snapshot of step {step}", make_place)
        save = Save(folder.snapshot(name), step, self.args.ddp_timeout)
        with threads.noting_failure(OSError):  # no room, say
            write_own(save)
        copies = self._copies
        assert copies is not None
        if self._is_first:
            self._check_size(save)
        copies.begin()
        save.copy_to_host(copies)
        warn_of_unpinned(copies, "memory_snapshot_steps")
        part = run, step, self.mesh.rank, self.mesh.world_size
        targets = [target for rank, target in hosts.neighbours() if rank == self.mesh.rank]
        sources = [rank for rank, target in hosts.neighbours() if target == self.mesh.rank]
        wires = self._connect()
        threads.start(
            partial(write_snapshot, save, part), [wires[rank] for rank in targets], [wires[rank] for rank in sources]
        )

    def _check_size(self, save: Save) -> None:
        """Of an optimizer whose state nobody knew before it was there. All ranks together."""
        assert self._folder is not None and self._hosts is not None and self._copies is not None
        self._is_first = False
        nbytes = sum(tensor.nbytes for piece in save.pieces for tensor in piece.tensors.values())
        is_larger = torch.tensor(float(nbytes > self._expected), device=self.mesh.device)
        if all_reduce(is_larger, self.mesh.world):
            awaited = max(nbytes - self._copies.reserved, 0) + self._copies.awaited
            check_room(self.mesh, self._hosts, self._folder, nbytes, awaited)

    def hold(self) -> None:
        """Masters or the optimizer's state are about to be written: a snapshot has to have copied them."""
        if self._copies is not None:
            self._copies.hold()

    def _settle(self) -> None:
        """Wait for the snapshot that is being written, and learn whether it is whole on all hosts. All ranks together.

        One that could not be written is no reason to end a run that the one before protects.
        """
        threads, self._writing = self._writing, None
        if threads is None:
            return
        failure = threads.wait()
        if failure is not None:
            logger.warning(f"rank {self.mesh.rank} could not write a memory snapshot: {failure}")
        failed = all_reduce(torch.tensor(float(failure is not None), device=self.mesh.device), self.mesh.world)
        if not failed:
            self._whole = threads.name
        elif self.mesh.rank == 0:
            step = threads.name.rpartition("-")[2]
            kept = (
                f"that of step {self._whole.rpartition('-')[2]} is kept" if self._whole else "there is none before it"
            )
            logger.warning(f"The memory snapshot of step {step} failed on {int(failed)} ranks; {kept}.")

    def _connect(self) -> dict[int, Wire]:
        """Once for a mesh."""
        assert self._hosts is not None
        if self._wired_mesh is not self.mesh:
            self._wires = connect(self.mesh, self._hosts, self.args.ddp_timeout)
            self._wired_mesh = self.mesh
        return self._wires


def _in_use(folder: MemoryFolder) -> str | None:
    holder = folder.acquire()
    return holder and f"the memory snapshots of this output_dir are in use: {holder}. Wait until that run has ended."


def _frozen(model: ParallelModel, weights: ShardedWeights) -> list[str]:
    """Weights that a resume would read of Hub files; of adapters all is in the training state."""
    if model.adapters:
        return []
    trained = {segment.name for segment in weights.segments}
    return [name for name, p in model.named_parameters() if not p.requires_grad and name not in trained]
