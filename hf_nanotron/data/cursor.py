"""Where a run is in its data, in terms that do not depend on how it is cut into ranks, batches and windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

ANEW = "pass ignore_data_skip=True to start the data from the beginning"
FINGERPRINT = "fingerprint"  # its key in an `order`; older checkpoints have none, and some data
OTHER_DATA = (
    "the samples of this run, or their order, differ from those of the checkpoint, so that some would be trained on "
    "twice and others never. A shuffle or split without a seed differs in every run: set a seed, or save the prepared "
    f"data once. To continue with new data, {ANEW}."
)


@dataclass(frozen=True)
class Cursor:
    """The samples that the steps of a run have trained on.

    Attributes:
        step: optimizer steps done.
        epoch: epochs begun; it is over only when `samples` is 0 of the next.
        samples: of this epoch, over all data-parallel ranks.
        order: what the order of samples depends on, to detect another order.
        state: `state_dict` of a stream after these samples.
        refused: why there is no such state.
    """

    step: int
    epoch: int
    samples: int
    order: dict[str, Any]
    state: Any = None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "order": dict(self.order), "state": self.state}

    def check(self, order: dict[str, Any]) -> None:
        """Refuse to go on in another order."""
        own = ("group", FINGERPRINT)  # of the run that began; compared with care
        names = [name for name in self.order if name not in own and self.order[name] != order.get(name)]
        if names:
            before, now = (", ".join(f"{name}={found.get(name)!r}" for name in names) for found in (self.order, order))
            raise ValueError(
                f"the checkpoint was saved in the middle of data with {before}, but this run has {now}: samples "
                f"would be repeated or skipped. Resume with the same data, or {ANEW}."
            )


def rounds_of(batches: int, dp_size: int, step_batches: int | None = None) -> int:
    """Rounds that deal so many micro-batches, one to each rank. Where `step_batches` are those of an optimizer step, a
    round ends with the step.
    """
    if step_batches is None:
        return math.ceil(batches / dp_size)
    steps, rest = divmod(batches, step_batches)
    return steps * math.ceil(step_batches / dp_size) + math.ceil(rest / dp_size)


@dataclass(frozen=True)
class EpochShape:
    """How an epoch of `samples` is cut: micro-batches, rounds of one for each rank, windows of rounds."""

    samples: int
    batch_size: int
    dp_size: int
    window: int
    drop_last: bool
    step_batches: int | None = None  # micro-batches of a window over all ranks, if its last round does not reach all

    @property
    def global_batch(self) -> int:
        return self.batch_size * (self.step_batches or self.dp_size * self.window)

    def rounds(self, start: int = 0) -> int:
        """Micro-batches of each rank from sample `start` to the end; a short last round counts."""
        left = max(self.samples - start, 0)
        batches = left // self.batch_size if self.drop_last else math.ceil(left / self.batch_size)
        return rounds_of(batches, self.dp_size, self.step_batches)

    def steps(self, start: int = 0) -> int:
        """Optimizer steps from sample `start` to the end."""
        return math.ceil(self.rounds(start) / self.window)


@dataclass(frozen=True)
class Resumption:
    """What remains of a run.

    Attributes:
        epoch, samples: where its data begins.
        rounds, steps: of the rest of this epoch.
        num_train_epochs: number of the epoch before which the run ends.
        max_steps: number of the last step of the run.
        is_resumed: whether a checkpoint's random state belongs to it.
    """

    epoch: int
    samples: int
    rounds: int
    steps: int
    num_train_epochs: int
    max_steps: int
    is_resumed: bool = True


def resume_at(cursor: Cursor, shape: EpochShape, num_train_epochs: float, max_steps: int) -> Resumption:
    """The rest of a run over data with a length, with sizes that may be new.

    Windows are counted from the cursor, so any sizes continue with the next sample. With `num_train_epochs` (1.5 ends
    in the middle of the second) the run ends with the same sample as before, in as many steps as that takes;
    `max_steps` takes precedence if positive.
    """
    epoch, samples = cursor.epoch, cursor.samples
    if shape.rounds(samples) == 0:  # a rest that `drop_last` leaves out
        epoch, samples = epoch + 1, 0
    left, full = shape.steps(samples), max(shape.steps(), 1)
    whole = math.floor(num_train_epochs)
    part = math.ceil(num_train_epochs * full) - whole * full
    if max_steps > 0:
        wanted = max(max_steps - cursor.step, 0)
    elif epoch < whole:
        wanted = left + (whole - epoch - 1) * full + part
    elif epoch == whole:
        end = min(part * shape.global_batch, shape.samples)
        wanted = math.ceil(max(end - samples, 0) / shape.global_batch)
    else:
        wanted = 0
    epochs = epoch if wanted == 0 else epoch + 1 + math.ceil(max(wanted - left, 0) / full)
    return Resumption(epoch, samples, shape.rounds(samples), left, epochs, cursor.step + wanted)


def why_not_resumable(stream: Any) -> str | None:
    """Why a stream cannot go on in the middle of an epoch; None if it can."""
    if not (callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))):
        return (
            f"the stream ({type(stream).__name__}) has no state_dict and load_state_dict, so all earlier samples would "
            "have to be read again. Add these two methods, or use a datasets.IterableDataset, which has them"
        )
    if size := shuffle_buffer(getattr(stream, "_ex_iterable", None)):
        return (
            f"the stream has a shuffle buffer (buffer_size={size}), and its state_dict omits the samples in it: they "
            "would never be trained on. Shuffle the stored rows instead; shuffle(buffer_size=1) shuffles the shards "
            "and reads several in turn, and can be resumed; so can hf_nanotron.data.TokenStream with a shuffle_buffer"
        )
    return None


def shuffle_buffer(source: Any) -> int:
    """Samples in the shuffle buffer of a `datasets.IterableDataset`; 0 if none. datasets has no public way to ask."""
    if source is None:
        return 0
    own = source.buffer_size if type(source).__name__ == "BufferShuffledExamplesIterable" else 0
    inner = [getattr(source, "ex_iterable", None), *getattr(source, "ex_iterables", ())]
    return max(own if own > 1 else 0, *map(shuffle_buffer, inner))
