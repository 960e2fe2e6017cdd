"""The data of `hf-nanotron train`: what its plan asks for is opened, and rows become batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..data.ordered import DOMAIN
from ..data.padding import PADDING
from ..data.streaming.stream_mixture import StreamMixture
from ..data.streaming.token_stream import TokenStream
from ..data.tokenize.chat_dataset import ChatDataset
from ..data.tokens.mixture import Mixture
from ..data.tokens.stage import Stage
from ..data.tokens.stages import Stages
from ..data.tokens.token_dataset import TokenDataset
from ..ops.cross_entropy import IGNORE_INDEX
from ..redaction import printable
from .data_plan import DataPlan, MixturePlan, SetPlan, StagePlan
from .errors import SettingsError, explained
from .table_data import load_stream, load_table


def load_data(plan: DataPlan, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """What to train on, and what to evaluate on (None, a dataset, or datasets by name).

    `seed` is that of orders, where the plan has none. The tokenizer, if there is one, tells the end of a document and
    how many ids there are, where the plan does not.
    """
    seed = seed if plan.seed is None else plan.seed
    train = _open(plan.train, tokenizer, seed)
    if isinstance(plan.evaluation, dict):
        return train, {name: _open_for_evaluation(part, tokenizer) for name, part in plan.evaluation.items()}
    return train, None if plan.evaluation is None else _open_for_evaluation(plan.evaluation, tokenizer)


def _open(plan: SetPlan | MixturePlan | list[StagePlan], tokenizer: Any, seed: int) -> Any:
    if isinstance(plan, SetPlan):
        return OPEN[plan.kind](plan, tokenizer, seed)
    if isinstance(plan, list):
        return _stages(plan, tokenizer, seed)
    sets = {name: _open(part, tokenizer, seed) for name, part in plan.sets.items()}
    with _named(f"{plan.where}.mixture"):
        if plan.is_stream:
            return StreamMixture(sets, plan.weights, seed)
        return Mixture(sets, plan.weights, seed, plan.max_epochs, plan.when_exhausted, plan.schedule)


def _stages(plans: list[StagePlan], tokenizer: Any, seed: int) -> Stages:
    """Sets alone are mixtures of one, which is read again and again; a set of `datasets` is known by its path."""
    stages = []
    for plan in plans:
        data = _open(plan.data, tokenizer, seed)
        if isinstance(plan.data, SetPlan) and plan.data.kind == "path":
            data = Mixture({plan.data.options["path"]: data}, [1.0], seed, max_epochs=None)
        stages.append(Stage(data, plan.start_tokens, plan.start_step, plan.global_batch_size))
    with _named("dataset.stages"):
        return Stages(stages)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Say of an error which part of the configuration it is about."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise SettingsError(printable(f"{where}: {error}")) from error


def _open_for_evaluation(plan: SetPlan, tokenizer: Any) -> Any:
    """Rows in the order of the files, unless a peer's order was asked for."""
    if plan.kind != "path" and "order" not in plan.options:
        plan = SetPlan(plan.where, plan.kind, {"shuffle": False, **plan.options})
    return _open(plan, tokenizer, 0)


def _tokens(plan: SetPlan, tokenizer: Any, seed: int) -> TokenDataset:
    options = {"seed": seed, **plan.options}
    paths = options.pop("tokens")
    if "split" in options:
        options["split"] = tuple(options["split"])
    if tokenizer is not None:
        options.setdefault("vocab_size", len(tokenizer))
        if tokenizer.eos_token_id is not None:
            options.setdefault("eos_token_id", tokenizer.eos_token_id)
    with _named(plan.where):
        return TokenDataset(paths, **options)


def _chat(plan: SetPlan, tokenizer: Any, seed: int) -> ChatDataset:
    if tokenizer is None:
        raise ValueError(f"{plan.where}.chat needs tokenizer, whose chat template is applied.")
    options = {"seed": seed, **plan.options}
    source = options.pop("chat")
    with _named(plan.where):
        return ChatDataset(source, tokenizer, **options)


def _stream(plan: SetPlan, tokenizer: Any, seed: int) -> TokenStream:
    options = {"seed": seed, **plan.options}
    arguments = {name: options.pop(name, None) for name in ("stream", "name", "data_files", "split")}
    if "text_column" in options and tokenizer is None:
        raise ValueError(f"{plan.where}.text_column needs a tokenizer with an end-of-text token.")
    with explained(f"{plan.where}.stream={arguments['stream']!r} cannot be read"):
        stream = load_stream(plan.where, **arguments)
    with _named(plan.where):
        return TokenStream(stream, tokenizer=tokenizer if "text_column" in options else None, **options)


OPEN: dict[str, Callable[[SetPlan, Any, int], Any]] = {
    "tokens": _tokens,
    "chat": _chat,
    "stream": _stream,
    "path": lambda plan, tokenizer, seed: load_table(plan, tokenizer),
}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as a batch of int64 `[B, S]`, padded on the right where they differ in length; of mixtures, `domain` `[B]`.

    Rows without labels predict themselves. Where some rows have `shift_labels`, `position_ids` or an `attention_mask`,
    as those of one set of a mixture may, the others get what they mean without.
    """
    columns = [{name: torch.as_tensor(row[name]) for name in PADDING if name in row} for row in rows]
    for row in columns:
        row.setdefault("labels", row["input_ids"])
        if len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(f"a sample has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels.")
    names = [name for name in PADDING if any(name in row for row in columns)]
    for row in columns:
        for name in names:
            if name not in row:
                row[name] = MEANT[name](row)
    batch = {
        name: pad_sequence([row[name] for row in columns], batch_first=True, padding_value=PADDING[name])
        for name in names
    }
    if DOMAIN in rows[0]:
        batch[DOMAIN] = torch.stack([torch.as_tensor(row[DOMAIN]) for row in rows])
    return batch


# What a row without a column means.
MEANT: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    "shift_labels": lambda row: F.pad(row["labels"][1:], (0, 1), value=IGNORE_INDEX),
    "position_ids": lambda row: torch.arange(len(row["input_ids"])),
    "attention_mask": lambda row: torch.ones_like(row["input_ids"]),
}
