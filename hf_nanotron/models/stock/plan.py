"""Which weights of a stock model are sharded over the tensor-parallel ranks, and how.

Only declarations of transformers are used (`config.base_model_tp_plan`, the `_tp_plan` of the class), never its code
that acts on them. What is missing or wrong there is in `families.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .anatomy import Anatomy, join
from .families import CARRIES_STATE, MIXES_TOKENS, PACKED, SHARDING, STYLES, SUMS_BEFORE, WHOLE_HEAD, WHOLE_WITH, row_of
from .foreign import is_foreign

# Linears inside a summed block that may stay whole although they write as many features as the block does: they choose
# experts, make low-rank inputs of cut layers, or are linear in the partial sum.
FEEDS_CUT_LAYERS = ("gate", "router", "q_a_proj", "kv_a_proj_with_mqa", "fc1_latent_proj", "fc2_latent_proj")
FEEDING_MODULES = ("indexer", "router", "gate")


@dataclass(frozen=True)
class Plan:
    """How a model is sharded.

    Attributes:
        styles: module or bare parameter -> style (`"colwise"`, `"rowwise"`, `"packed_colwise"`, `"packed_rowwise"`,
            `"qkv"`, `"heads"`, `"norm"`, `"unit_norm"`, `"vocabulary"`, `"experts"`).
        regions: blocks whose partial outputs are summed.
        whole: blocks without sharded weights that mix tokens.
        spread: blocks whose experts are spread over the expert-parallel ranks.
        after_sum: modules inside `regions` that work on the sum already.
    """

    styles: dict[str, str]
    regions: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    after_sum: tuple[str, ...] = ()


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts behind transformers' common interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def mixes_tokens(block: nn.Module) -> bool:
    """Whether a block computes a token's output from other tokens too, or may do so by code of the user's."""
    names = [cls.__name__ for cls in type(block).__mro__]
    return is_foreign(block) or any(part in name and "Norm" not in name for name in names for part in MIXES_TOKENS)


def carries_state(block: nn.Module) -> bool:
    """Whether a block goes on from one packed document of a row to the next, wherever `position_ids` begin anew."""
    names = [cls.__name__ for cls in type(block).__mro__]
    return any(part in name and "Norm" not in name for name in names for part in CARRIES_STATE)


def make_plan(anatomy: Anatomy, tp_size: int, ep_size: int) -> Plan:
    """Decide about every weight of a whole stock model."""
    model, found = anatomy.model, anatomy.blocks()
    spread: dict[str, str] = {}  # block -> its experts
    if ep_size > 1:
        for path, block in found:
            for name, module in block.named_modules():
                if is_experts(module):
                    spread[path] = join(path, name)
        if not spread:
            raise ValueError(
                f"ep_size={ep_size}: {type(model).__name__} ({model.config.model_type!r}) has no experts with "
                "transformers' common interface; use ep_size=1."
            )
    styles = _cut_styles(anatomy, found) if tp_size > 1 else {}
    for path, experts in spread.items():
        styles = {name: style for name, style in styles.items() if not name.startswith(path + ".")}
        module = model.get_submodule(experts)
        styles |= {join(experts, leaf): "experts" for leaf, _ in module.named_parameters(recurse=False)}
    regions = [
        path
        for path, _ in found
        if path not in spread and any(name == path or name.startswith(path + ".") for name in styles)
    ]
    if tp_size > 1:
        _check_regions(model, regions, styles)
    mixes = [path for path, block in found if path not in regions and path not in spread and mixes_tokens(block)]
    sums = {path: row_of(SUMS_BEFORE, block) for path, block in found}
    after_sum = tuple(join(path, before) for path in regions if (before := sums[path]) is not None)
    return Plan(styles, tuple(regions), tuple(mixes) if tp_size > 1 else (), tuple(spread), after_sum)


def packed_linears(anatomy: Anatomy) -> list[str]:
    """Linear layers that store two of one size, one after the other (gate and up), whether or not they are cut."""
    model = anatomy.model
    packed = [regex for regex, style in _declared(anatomy) if style == PACKED]
    named = [name for name, _ in model.named_modules() if any(regex.fullmatch(name) for regex in packed)]
    for path, block in anatomy.blocks():
        rows = row_of(SHARDING, block) or {}
        named += [join(path, name) for name, style in rows.items() if style == PACKED and _get(block, name) is not None]
    return [name for name in dict.fromkeys(named) if isinstance(_get(model, name), nn.Linear)]


def _declared(anatomy: Anatomy) -> list[tuple[re.Pattern[str], str]]:
    """The styles that transformers declares, by patterns of names."""
    declared = getattr(anatomy.model.config.get_text_config(), "base_model_tp_plan", None) or {}
    patterns = {join(anatomy.backbone, name): style for name, style in declared.items()}
    patterns.update(type(anatomy.model)._tp_plan or {})
    return [(re.compile(p.replace(".", r"\.").replace("*", r"[^.]+")), style) for p, style in patterns.items()]


def _cut_styles(anatomy: Anatomy, found: list[tuple[str, nn.Module]]) -> dict[str, str]:
    model, regexes = anatomy.model, _declared(anatomy)
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    styles: dict[str, str] = {}
    for name in names:
        for regex, style in regexes:
            if not regex.fullmatch(name):
                continue
            if style not in STYLES:
                raise ValueError(
                    f"{type(model).__name__}: the plan shards {name!r} as {style!r}, which this version does not "
                    f"support (it supports {', '.join(STYLES)}); use tp_size=1, or another plan (register_plan)."
                )
            if STYLES[style] is not None:
                styles[name] = str(STYLES[style])
    overrides = {path: rows for path, block in found if (rows := row_of(SHARDING, block)) is not None}
    if not any(name.startswith(join(anatomy.backbone, "")) for name in styles) and not overrides:
        raise ValueError(
            f"{type(model).__name__}: its config ({model.config.model_type!r}) declares no tensor-parallel plan "
            "(`base_model_tp_plan`) and none was registered with register_plan, so its layers cannot be sharded; "
            "use tp_size=1."
        )
    for path, rows in overrides.items():
        block = model.get_submodule(path)
        holds = getattr(block, row_of(WHOLE_WITH, block) or "", None) is not None
        if "" in rows or holds:
            styles = {name: style for name, style in styles.items() if not name.startswith(path + ".")}
        for name, cut in rows.items():
            if name and not holds and _get(block, name) is not None:
                styles.pop(join(path, name), None)
                if cut is not None:
                    styles[join(path, name)] = cut
    styles.pop(anatomy.head, None)
    if model.config.get_text_config().model_type not in WHOLE_HEAD:
        styles[anatomy.head] = "vocabulary"
        styles[anatomy.embedding] = "vocabulary"
    return styles


def _get(module: nn.Module, name: str) -> object:
    """What a module holds under a name with dots; None if there is nothing."""
    owner, _, leaf = name.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), leaf, None)
    except AttributeError:
        return None


def _check_regions(model: PreTrainedModel, regions: list[str], styles: dict[str, str]) -> None:
    """Every path through a summed block must pass a cut layer: what does not would be counted once for every rank."""
    width = model.config.get_text_config().hidden_size
    for region in regions:
        for name, module in model.get_submodule(region).named_modules():
            path = join(region, name)
            *owners, leaf = name.split(".")
            feeds = leaf in FEEDS_CUT_LAYERS or any(owner in FEEDING_MODULES for owner in owners)
            writes = isinstance(module, nn.Linear) and module.out_features == width
            if writes and not feeds and path not in styles:
                raise ValueError(
                    f"{type(model).__name__}: the outputs of {region!r} are summed over the tensor-parallel ranks, but "
                    f"{path!r} is replicated, so it would be counted tp_size times. Say how to shard it with "
                    f"register_plan({type(model.get_submodule(region)).__name__!r}, ...), or use tp_size=1."
                )
