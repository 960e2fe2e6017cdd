"""Cases of the fuzzer: a value for each axis, drawn so that every pair of values of two axes comes soon."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

Case = dict[str, Any]
STEPS, SAVED, LIMIT = 4, 2, 8  # optimizer steps, step of the checkpoint, most processes

# Hub types with the fields that differ from `families.json`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "mamba2": ("mamba2", {}),
    "bamba": ("bamba", {}),
    "nemotron_h": ("nemotron_h", {}),
    "qwen3_next": ("qwen3_next", {}),
}
MIXTURES = ("qwen3_moe", "qwen3_moe tied", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "nemotron_h", "qwen3_next")
MIXTURES += ("gemma4",)
RECURRENT = ("mamba2", "bamba", "nemotron_h", "qwen3_next")
# Whose MLPs `mlp_chunk_tokens` knows.
GATED = ("llama", "qwen2", "mistral", "smollm3", "olmo2", "gemma2", "gemma3_text", "gemma4_text", "qwen3_moe")
GATED += ("deepseek_v3", "glm4_moe", "bamba", "qwen3_next")
LAYERS = {"gemma4": 6}
HEADS = 4

# The first value of an axis is its default, to which a case is set back where a combination is refused.
AXES: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "vocabulary": (128, 131),
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "cp": (1, 2, 4),
    "dp": (1, 2, 3, 4),
    "ep": (1, 2, 4),
    "schedule": ("1f1b", "afab", "interleaved_1f1b", "zb", "zb interleaved"),
    "sequence_parallel": (True, False),
    "zero_stage": (1, 0, 2, 3),
    "replicas": (1, 2),
    "cp_mode": ("auto", "gather", "heads"),
    "rows": (1, 2),
    "recompute": ("off", "full", "selective", "all_but_attention", "one layer"),
    "tp_overlap": (False, True),
    "mlp_chunk_tokens": (None, 5),
    "optimizer": (
        "adamw_torch", "adamw_torch_fused", "bf16 moments", "muon", "muon original", "muon spectral", "lion_32bit",
        "sgd", "rmsprop", "user's", "user's of matrices",
    ),
    "no_weight_decay": (False, True),
    "parametrization": ("standard", "spectral"),
    "rates": ("cosine", "warmup_stable_decay", "constant_with_warmup", "polynomial"),
    "batch_warmup": (False, True),
    "loss": ("plain", "z-loss", "smoothing", "function"),
    "router_loss": (False, True),
    "bias_update": (False, True),
    "neftune": (False, True),
    "dropout": (False, True),
    "average": ("no", "kept", "evaluated"),
    "frozen": ("nothing", "embedding", "first layer", "norms", "all but the last layer"),
    "clip": (1.0, 0.0, 0.05),
    "data": (
        "rows", "mask", "no mask", "left", "packed", "flattened", "tokens", "documents", "mixture", "iterable",
        "stream",
    ),
    "epochs": (False, True),
    "workers": (0, 2),
    "between": ("nothing", "evaluation", "generation"),
    "prediction": (False, True),
    "save": ("no", "steps", "async", "last", "memory", "weights alone"),
    "end": ("none", "stop", "raise", "kill"),
    "elastic": (False, True),
    # the layout that goes on from the checkpoint
    "then tp": (1, 2, 4),
    "then pp": (1, 2, 4),
    "then cp": (1, 2, 4),
    "then dp": (1, 2, 3, 4),
    "then ep": (1, 2, 4),
    "then schedule": ("1f1b", "afab", "interleaved_1f1b", "zb", "zb interleaved"),
    "then zero_stage": (1, 0, 2, 3),
}  # fmt: skip
NO_WIDTHS = ("sgd", "rmsprop", "muon", "muon original")  # whose updates depend on the gradient's size, or on shapes
TOKEN_DATA = ("tokens", "documents", "mixture")
DOCUMENTS = ("packed", "flattened", "documents", "mixture", "stream")  # whose rows hold several, kept apart
# Neither stock Trainer's nor written out in `fuzz_stock.py`, so that one process of ours is the reference.
OURS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("bf16 moments", "muon", "muon original", "muon spectral", "user's of matrices"),
    "parametrization": ("spectral",),
    "batch_warmup": (True,),
    "bias_update": (True,),
    "neftune": (True,),
    "dropout": (True,),
}


def layouts(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prefix of a layout's axes, and the layout: of the run, and of what goes on after its end."""
    for prefix in ("", "then ") if case["end"] != "none" else ("",):
        yield prefix, {name: case[prefix + name] for name in ("tp", "pp", "cp", "dp", "ep", "schedule", "zero_stage")}


def world(layout: dict[str, Any]) -> int:
    return math.prod(layout[name] for name in ("tp", "pp", "cp", "dp"))


def stages(layout: dict[str, Any]) -> int:
    return int(layout["pp"]) * (2 if "interleaved" in layout["schedule"] else 1)


def any_layout(test: Callable[[dict[str, Any], Case], Any]) -> Callable[[Case], bool]:
    return lambda case: any(test(layout, case) for _, layout in layouts(case))


def cut(case: Case, axis: str) -> bool:
    """Whether a layout has more than one rank along the axis."""
    return any(layout[axis] > 1 for _, layout in layouts(case))


# What is refused, and documented: when, the axes that are set back, and what the sentence says.
REFUSED: tuple[tuple[Callable[[Case], bool], str, str], ...] = (
    (
        any_layout(lambda layout, case: layout["zero_stage"] == 3 and "zb" in layout["schedule"]),
        "schedule, then schedule",
        r"pp_schedule='zb' with zero_stage=3",
    ),
    (
        any_layout(lambda layout, case: case["mlp_chunk_tokens"] and "zb" in layout["schedule"]),
        "mlp_chunk_tokens",
        r"mlp_chunk_tokens=5 with pp_schedule='zb'",
    ),
    (lambda case: case["mlp_chunk_tokens"] and case["tp_overlap"], "mlp_chunk_tokens", "mlp_chunk_tokens=5 with tp_ov"),
    (
        lambda case: case["mlp_chunk_tokens"] and FAMILIES[case["family"]][0] not in GATED,
        "mlp_chunk_tokens",
        r"mlp_chunk_tokens=5: no MLP of \w+ can be computed over blocks",
    ),
    (
        lambda case: case["parametrization"] == "spectral" and case["optimizer"] in NO_WIDTHS,
        "parametrization",
        r"parametrization='spectral' with optim=",
    ),
    (
        lambda case: case["parametrization"] == "spectral" and case["optimizer"] == "user's",
        "parametrization",
        r"parametrization='spectral' with Element",
    ),
    (
        lambda case: case["parametrization"] == "spectral" and case["family"] == "gemma4",
        "parametrization",
        r"parametrization='spectral' is not supported for",
    ),
    (
        any_layout(lambda layout, case: layout["cp"] > 1 and case["family"] in ("gemma2", "gpt_oss", "mamba2")),
        "cp, then cp",
        r"cp_size=\d is not supported for",
    ),
    (
        lambda case: case["save"] == "last" and case["frozen"] != "nothing",
        "frozen",
        r"save_hub_weights='last' with \d+ fro",
    ),
    (
        lambda case: case["save"] == "memory" and case["frozen"] != "nothing",
        "frozen",
        r"memory_snapshot_steps=1 with \d+ frozen parameters",
    ),
    (
        any_layout(lambda layout, case: layout["cp"] > 1 and case["loss"] == "smoothing"),
        "loss",
        r"cp_size=\d with label_smoothing_factor",
    ),
    (any_layout(lambda layout, case: layout["cp"] > 1 and case["dropout"]), "dropout", r"attention_dropout above 0"),
    (
        lambda case: case["family"] in RECURRENT and case["dropout"] and case["sequence_parallel"] and cut(case, "tp"),
        "dropout",
        r"sequence_parallel=True with attention_dropout=0.1: every rank computes all of",
    ),
    (
        any_layout(lambda layout, case: layout["cp"] > 1 and case["data"] == "left"),
        "data",
        r"cp_size=\d: a batch with attention_mask",
    ),
    (
        any_layout(
            lambda layout, case: (
                layout["cp"] > 1
                and layout["tp"] > 1
                and case["tp_overlap"]
                and case["family"] in ("bamba", "nemotron_h", "qwen3_next")
            )
        ),
        "tp_overlap",
        r"cp_size=\d is not supported for \w+: \w+ sees whole rows, which are not sent in parts; use tp_overlap=False",
    ),  # fmt: skip
    (
        lambda case: case["data"] == "iterable" and case["end"] != "none",
        "data",
        r"cannot resume in epoch 0 after sample \d+: the stream \(Plain\) has no state_dict",
    ),
    (
        any_layout(lambda layout, case: case["family"] == "gemma4" and stages(layout) > 3),
        "pp, then pp",
        r"layers 2 to 5 share keys and values and must be on one stage, so use at most 3 stages",
    ),
    (
        any_layout(lambda layout, case: layout["tp"] > 1 and case["family"] in ("gpt2",)),
        "tp, then tp",
        r"GPT2LMHeadModel: its config \('gpt2'\) declares no tensor-parallel plan",
    ),
    (
        any_layout(
            lambda layout, case: (
                case["cp_mode"] == "heads" and layout["cp"] > 1 and HEADS // layout["tp"] % layout["cp"]
            )
        ),
        "cp_mode",
        r"cp_mode='heads' needs attention heads \(4 / tp_size=\d\) that cp_size divides",
    ),
)


def unpacks(case: Case) -> bool:
    """Whether rows hold documents that the stock model does not keep apart, and ours does.

    Where `position_ids` alone have the borders, a recurrence carries its state over them, here as in stock.
    """
    if case["family"] in RECURRENT:
        return case["data"] == "flattened"
    return case["data"] in DOCUMENTS and case["family"] == "gpt_neox"


def is_stock(case: Case) -> bool:
    """Whether stock Trainer is the reference."""
    if case["family"] == "gpt2":  # its stock loss is divided by all labels
        return False
    if case["router_loss"] and case["between"] == "generation":  # which stock models fail to do with a mask
        return False
    # Figures of an evaluation are of rows, and documents of their own are others.
    if unpacks(case) and (case["prediction"] or case["between"] == "evaluation"):
        return False
    return not any(case[axis] in values for axis, values in OURS.items())


def settle(case: Case) -> Case:
    """The case, where axes without meaning have their defaults and sizes fit."""
    case = dict(case)
    default = lambda *axes: case.update({axis: AXES[axis][0] for axis in axes})  # noqa: E731
    if case["save"] in ("no", "weights alone"):
        default("end")
    elif case["end"] == "none" and case["save"] == "memory":
        case["end"] = "raise"
    if case["save"] == "memory" and case["end"] == "stop":
        case["end"] = "kill"
    if case["end"] == "none":
        default("elastic", *(axis for axis in AXES if axis.startswith("then ")))
    for prefix in ("", "then "):
        while world({name: case[prefix + name] for name in ("tp", "pp", "cp", "dp")}) > LIMIT:
            largest = max(("dp", "tp", "cp", "pp"), key=lambda name: case[prefix + name])
            case[prefix + largest] = max(1, case[prefix + largest] // 2)
        layout = {name: case[prefix + name] for name in ("tp", "pp", "cp", "dp", "ep")}
        if (
            layout["pp"] == 1
            or layout["pp"] * 2 > LAYERS.get(case["family"], 4)
            and "inter" in case[prefix + "schedule"]
        ):
            default(prefix + "schedule")
        copies = layout["cp"] * layout["dp"] * layout["tp"]
        if case["family"] not in MIXTURES or copies % layout["ep"]:
            default(prefix + "ep")
    if case["tp"] * case["then tp"] == 1:
        default("sequence_parallel")
    if not case["sequence_parallel"] or case["tp"] == 1 or case["then tp"] == 1 and case["end"] != "none":
        default("tp_overlap")
    if case["dp"] * case["cp"] % 2 or case["zero_stage"] == 0 or case["end"] != "none":
        default("replicas")
    if case["replicas"] > 1 and case["cp"] * case["dp"] * case["tp"] // 2 % case["ep"]:
        default("replicas")
    if case["cp"] * case["then cp"] == 1:
        default("cp_mode")
    if case["family"] not in MIXTURES:
        default("router_loss")
    if case["family"] not in ("mixtral", "qwen3_moe", "qwen3_moe tied"):
        default("router_loss")
    if case["family"] not in ("deepseek_v3", "glm4_moe"):
        default("bias_update")
    if case["data"] not in TOKEN_DATA:
        default("batch_warmup")
    if case["data"] in ("iterable", "stream", *TOKEN_DATA) or case["batch_warmup"]:
        default("epochs")
    if case["data"] in ("iterable",):
        default("workers")
    return case


def pairs(case: Case) -> set[tuple[Any, ...]]:
    """Every two values of two axes."""
    return set(itertools.combinations([(axis, case[axis]) for axis in AXES], 2))


class Design:
    """Cases by number: each is the best of some random ones, by the pairs that it is the first to have.

    All of them have the values of `where`.
    """

    def __init__(self, seed: int, candidates: int = 24, where: Case | None = None) -> None:
        self.random, self.candidates, self.where = random.Random(seed), candidates, where or {}
        self.covered: set[tuple[Any, ...]] = set()
        self.cases: list[Case] = []

    def case(self, number: int) -> Case:
        while len(self.cases) <= number:
            drawn = [self._draw() for _ in range(self.candidates)]
            # small jobs are cheaper, so that more of them are run
            best = max(drawn, key=lambda case: len(pairs(case) - self.covered) - 8 * self._size(case))
            self.covered |= pairs(best)
            self.cases.append({**best, "compile": self.random.random() < 0.02})
        return self.cases[number]

    def _size(self, case: Case) -> int:
        return sum(world(layout) for _, layout in layouts(case))

    def _draw(self) -> Case:
        for _ in range(1000):
            case = self._allowed(settle({**self._any(), **self.where}), self.random.random() < 0.1)
            if all(case[axis] == value for axis, value in self.where.items()):
                return case
        raise ValueError(f"no case has {self.where}: REFUSED and `settle` of fuzz_axes.py say why.")

    def _any(self) -> Case:
        """Of a third of the cases stock Trainer has all."""
        of_stock = self.random.random() < 0.35
        return {
            axis: self._value(axis, tuple(x for x in values if not (of_stock and x in OURS.get(axis, ()))))
            for axis, values in AXES.items()
        }

    def _value(self, axis: str, values: tuple[Any, ...]) -> Any:
        # Often the default, where other values are large jobs.
        if axis.split()[-1] in ("tp", "pp", "cp", "dp", "replicas") and self.random.random() < 0.4:
            return values[0]
        return self.random.choice(values)

    def refused(self, row: int) -> Case:
        """A small case that a row of `REFUSED` is about, and no other."""
        found: list[Case] = []
        while len(found) < 5:
            case = self._allowed(settle(self._any()), True, row)
            if case["refused"] == row:
                found.append(case)
        return min(found, key=self._size)

    def _allowed(self, case: Case, probes: bool, kept: int | None = None) -> Case:
        """The case without what is refused, or with one of it: of the row `kept` if it is given."""
        for number, (applies, axes, _) in enumerate(REFUSED * 2):
            if not applies(case):
                continue
            if probes and kept in (None, number % len(REFUSED)):
                kept = number % len(REFUSED)
                continue
            case = settle({**case, **{axis: AXES[axis][0] for axis in axes.split(", ")}})
        return {**case, "refused": kept if kept is not None and REFUSED[kept][0](case) else None}
