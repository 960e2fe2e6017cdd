"""What of the sharding code each family needs, and a few families that need all of it together.

Most families are built alike: the same parameters in a block, cut in the same way. Those of `BY_DEFAULT` train in every
run of the tests, the others with `--full-matrix`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from family_runs import tiny_model

from hf_nanotron.models.stock import families
from hf_nanotron.models.stock.anatomy import Anatomy, dissect
from hf_nanotron.models.stock.plan import carries_state, make_plan
from hf_nanotron.models.weight_roles import weight_roles

# Tables whose rows are an exception each: by the class of a module, or by the type of the model.
EXCEPTIONS = (
    *("CARRIES", "FUSED_PARTS", "MIXES_DTYPES", "RETURNS_TUPLE", "SUMS_BEFORE", "TOKEN_ARGUMENTS"),
    *("WHOLE_WITH", "WRITES_WEIGHTS", "NO_PIPELINE", "NO_SEQUENCE_PARALLEL", "SEQUENCE_DIM", "WHOLE_HEAD"),
)

# Made by taking the family that adds most mechanisms, again and again; first without the types of the newest release.
BY_DEFAULT = (
    *("afmoe", "apertus", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "biogpt", "bitnet"),
    *("bloom", "codegen", "cohere", "deepseek_v4", "diffllama", "doge", "dory", "dots3_note", "ernie4_5_moe"),
    *("falcon", "falcon_h1", "falcon_mamba", "flint", "gemma3", "gemma3n_text", "gemma4", "glm", "glm_moe_dsa"),
    *("gpt-sw3", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granitemoe_swa", "hrm_text"),
    *("hunyuan_v1_moe", "hy_v4", "inkling2_loop_text", "inkling2_text", "inkling_text", "jais2", "jamba"),
    *("kimi_linear", "laguna", "lfm2_moe", "llama", "llama4", "longcat_flash", "minimax", "minimax_m3_vl_text"),
    *("mpt", "nanochat", "nemotron_h", "olmo_hybrid", "persimmon", "phi", "phi4_multimodal", "qwen3_next"),
    *("qwen4_exp", "starcoder2", "xglm", "zaya"),
)


def mechanisms(family: str) -> set[tuple[Any, ...]]:
    """On the meta device: its rows of `EXCEPTIONS`, what lies outside of its layers, and its kinds of blocks.

    A kind of block is its parameters with the style of each, and what is done with its tokens and its output.

    Raises:
        AssertionError: for a weight without a role.
    """
    with torch.device("meta"):
        model = tiny_model(family)
    anatomy, config = dissect(model), model.config.get_text_config()
    assert weight_roles(anatomy).keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    names = {type(module).__name__ for module in model.modules()} | {config.model_type}
    found: set[tuple[Any, ...]] = {("tied", getattr(config, "tie_word_embeddings", False))}
    found |= {(table, row) for table in EXCEPTIONS for row in getattr(families, table) if row in names}
    for place in ("first", "last", "everywhere"):
        found |= {(place, name.rpartition(".")[2]) for name in getattr(anatomy, place)}
    return found | _kinds_of_blocks(anatomy, 2, 1) | _kinds_of_blocks(anatomy, 1, 2)


def _kinds_of_blocks(anatomy: Anatomy, tp_size: int, ep_size: int) -> set[tuple[Any, ...]]:
    try:
        plan = make_plan(anatomy, tp_size, ep_size)
    except ValueError as error:
        return {("refused", anatomy.model.config.model_type, str(error))} if tp_size > 1 else set()
    kinds = set()
    for path, block in anatomy.blocks():
        start = len(path) + 1
        styles = {(_unnumbered(name[start:]), plan.styles[name]) for name in plan.styles if name.startswith(path + ".")}
        parameters = {_unnumbered(name) for name, _ in block.named_parameters()}
        place = next((kind for kind in ("regions", "whole", "spread") if path in getattr(plan, kind)), "replicated")
        if place == "replicated":
            parameters = set()
        kinds.add((ep_size, place, frozenset(parameters), frozenset(styles), carries_state(block)))
    return kinds


def _unnumbered(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name)
