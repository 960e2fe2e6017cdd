"""Snapshots of a run in the memory of its hosts: taken every few steps, and taken up by a restart before the disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.utils import logging

from ..checkpoint.directory.host_copies import HostCopies
from ..checkpoint.directory.retention import from_rank_0, is_checkpoint_name, is_part, newest, run_at_hand, step_of
from ..checkpoint.directory.runs import Run
from ..checkpoint.directory.save import Save
from ..checkpoint.files.checked import write_checked
from ..checkpoint.hub.model import held_buffers
from ..checkpoint.memory.folder import MemoryFolder, part_name, read_part, snapshot_name, write_part
from ..checkpoint.memory.hosts import Hosts, find_hosts
from ..checkpoint.memory.resume import VALUES, Snapshot, find_snapshots, make_checkpoint
from ..checkpoint.memory.room import check_room
from ..checkpoint.memory.transfer import Wire, receive_files, send_files
from ..checkpoint.state.file import write_rank
from ..checkpoint.state.slices import Slice
from ..checkpoint.state.training_state import DIRECTORY
from ..checkpoint.state.values import encode
from ..models.base import ParallelModel
from ..optim.ema import WeightAverage
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import refuse_together, together
from ..parallel.zero.segment import ShardedWeights
from ..training_args import NanotronTrainingArguments
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
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        if self.is_on and self.mesh.rank == 0 and restarts != "0" and not _is_auto(resume_from_checkpoint):
            logger.warning(
                f"memory_snapshot_steps={self.args.memory_snapshot_steps}, but after a failure torchrun starts the "
                f"ranks again with resume_from_checkpoint={resume_from_checkpoint!r}, which looks at no snapshot; set "
                "resume_from_checkpoint='auto'."
            )

    # ---- taking up ----

    def holds(self, source: str | None) -> bool:
        """Whether a checkpoint was made of a snapshot."""
        return source is not None and self._folder is not None and Path(source).parent == self._folder.path

    def _usable(self) -> list[Snapshot]:
        """The whole snapshots of the run at hand, the newest first."""
        if self._folder is None or self._hosts is None:
            return []
        output_dir = cast(str, self.args.output_dir)
        at_hand = together(
            self.mesh, "looking for the run", lambda: run_at_hand(output_dir) if self.mesh.rank == 0 else None
        )
        said = from_rank_0(self.mesh, None if at_hand is None else at_hand.to_dict())
        run = None if said is None else Run.from_dict(said)
        usable = []
        for snapshot in find_snapshots(self.mesh, self._hosts, self._folder):
            if run is None or not run.has(snapshot.run, snapshot.step):
                why = "it is of another run than the one that was started last in output_dir"
            elif missing := snapshot.missing:
                why = f"the parts of ranks {_listed(missing)} are gone with their hosts, or were not complete"
            else:
                usable.append(snapshot)
                continue
            if self.mesh.rank == 0:
                logger.warning(f"The memory snapshot of step {snapshot.step} is not used: {why}.")
        return usable

    def choose(self, on_disk: Callable[[], str | None]) -> str | None:
        """The checkpoint to go on from: made of the newest snapshot, unless what `on_disk` finds is newer.

        The disk is asked for what it has only if its newest checkpoint is newer, or no snapshot can be used.
        """
        if not self.is_on:
            return on_disk()
        mesh, snapshots = self.mesh, self._usable()
        if not snapshots:
            return on_disk()
        what, is_first = "looking for checkpoints", mesh.rank == 0
        newest_on_disk = together(mesh, what, lambda: _newest_step(cast(str, self.args.output_dir)) if is_first else -1)
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
        wanted = [Slice(segment.spec, segment.start, segment.stop) for segment in self.weights.segments]
        wanted += [Slice.whole(name, tuple(buffer.shape)) for name, buffer in held_buffers(self.model).items()]
        path = make_checkpoint(self.mesh, self._hosts, self._folder, snapshot, wanted)
        if self.args.load_best_model_at_end:
            what, is_first = "looking for the best checkpoint", self.mesh.rank == 0
            lost = together(self.mesh, what, lambda: _lost_best(path, snapshot.run) if is_first else None)
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
        if frozen := _frozen(self.model, self.weights):
            raise ValueError(
                f"memory_snapshot_steps={self.args.memory_snapshot_steps} with {len(frozen)} frozen parameters "
                f"({frozen[0]}, ...): they are in the Hub files of checkpoints only, which a snapshot does not have; "
                "leave memory_snapshot_steps out."
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
        """Ways to the ranks on other hosts that copies go to or come from: made once for a mesh, by gloo."""
        hosts, mesh = self._hosts, self.mesh
        assert hosts is not None
        if self._wired_mesh is not mesh:
            self._wires, self._wired_mesh = {}, mesh
            timeout = timedelta(seconds=self.args.ddp_timeout)
            for pair in hosts.pairs():
                if mesh.rank in pair:
                    try:
                        handle: Any = dist.new_group(
                            list(pair), timeout=timeout, backend="gloo", use_local_synchronization=True
                        )
                    except RuntimeError as error:
                        raise RuntimeError(
                            f"memory_snapshot_steps: ranks {pair[0]} and {pair[1]}, of neighbouring hosts, cannot "
                            f"connect by gloo ({error}); GLOO_SOCKET_IFNAME=eth0 (or its like) names the interface."
                        ) from error
                    other = pair[0] if pair[1] == mesh.rank else pair[1]
                    self._wires[other] = Wire(other, handle, torch.device("cpu"))
                    mesh.at_close(_destroying(handle))
        return self._wires


class SnapshotThreads:
    """Writes a rank's part of one snapshot, sends it to another host and takes in copies, each in a thread."""

    def __init__(self, name: str, rank: int, folder: MemoryFolder) -> None:
        self.name, self._rank, self._folder = name, rank, folder
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    @contextlib.contextmanager
    def noting_failure(self, kind: type[Exception] = Exception) -> Iterator[None]:
        """What fails in here makes the snapshot fail, not the run."""
        try:
            yield
        except kind as error:
            self._failures.append(error)

    def start(self, write: Callable[[], None], targets: list[Wire], sources: list[Wire]) -> None:
        """`write` the part, then send it to `targets`; receive those of `sources` meanwhile."""
        directory, marker = self._folder.snapshot(self.name), part_name(self._rank)

        def write_and_send() -> None:
            names: list[str] = []
            with self.noting_failure():
                if not self._failures:
                    write()
                    names = [*read_part(directory / marker).files, marker]  # the marker last
            for wire in targets:  # also after a failure, or the other side would wait
                self._begin(partial(send_files, wire, directory, names, bool(names)), is_own=False)

        def receive(wire: Wire) -> None:
            is_whole, _ = receive_files(wire, directory)
            if not is_whole:
                raise RuntimeError(f"rank {wire.other} has not written its part, so this host has no copy of it.")

        self._begin(write_and_send, is_own=True)
        for wire in sources:
            self._begin(partial(receive, wire), is_own=False)

    def _begin(self, action: Callable[[], Any], is_own: bool) -> None:
        def run() -> None:
            with self.noting_failure():
                action()

        # The interpreter waits for this rank's own part, not for what another host may never send or take.
        thread = threading.Thread(target=run, name=f"memory snapshot {self.name}", daemon=not is_own)
        self._threads.append(thread)
        thread.start()

    def wait_for_own(self) -> None:
        """Until this rank's part is written, or has failed."""
        for thread in [thread for thread in self._threads if not thread.daemon]:
            thread.join()

    def wait(self) -> BaseException | None:
        """Until all threads have ended: what failed first."""
        self.wait_for_own()  # which begins those that send
        for thread in self._threads:
            thread.join()
        return self._failures[0] if self._failures else None


def write_snapshot(save: Save, part: tuple[Run, int, int, int]) -> None:
    """What is left of a rank's part of a snapshot, and its marker. Communicates with nobody.

    Args:
        part: run, step, rank and number of ranks.
    """
    directory, rank = save.directory, part[2]
    if save.copies is not None:
        save.copies.complete()
    write_rank(directory / DIRECTORY, rank, save.pieces)
    own = [f"{DIRECTORY}/rank-{rank:05d}.{kind}" for kind in ("json", "safetensors")]
    own = [name for name in own if (directory / name).is_file()]
    names = [*own, *(path.name for path in save.files)]
    if rank == 0:
        write_checked(directory / VALUES, {"values": encode(save.values, "training state")}, durable=False)
        own, names = [*own, VALUES], [*names, VALUES]
    write_part(directory, part, names, own)


def _is_auto(named: str | bool | None) -> bool:
    return named is True or str(named).partition(":")[0] == "auto"


def _in_use(folder: MemoryFolder) -> str | None:
    holder = folder.acquire()
    return holder and f"the memory snapshots of this output_dir are in use: {holder}. Wait until that run has ended."


def _newest_step(output_dir: str) -> int:
    """Of the committed checkpoints of the run at hand, -1 if there is none."""
    run = run_at_hand(output_dir)
    return max((step_of(path.name) for path in newest(output_dir, run)), default=-1) if run is not None else -1


def _frozen(model: ParallelModel, weights: ShardedWeights) -> list[str]:
    """Weights that a resume would read of Hub files; of adapters all is in the training state."""
    if model.adapters:
        return []
    trained = {segment.name for segment in weights.segments}
    return [name for name, p in model.named_parameters() if not p.requires_grad and name not in trained]


def _lost_best(checkpoint: Path, run: Run) -> str | None:
    """Whether the best checkpoint of a snapshot was still being written when the run died."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    best = state.best_model_checkpoint
    if best is None or is_part(run, Path(best)):
        return None
    return f"its best checkpoint, {best}, was not complete, and load_best_model_at_end needs it"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _destroying(handle: Any) -> Callable[[], None]:
    def destroy() -> None:
        with contextlib.suppress(Exception):  # the job may have destroyed all groups by then
            dist.destroy_process_group(handle)

    return destroy
