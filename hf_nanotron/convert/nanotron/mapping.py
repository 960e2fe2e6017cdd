"""Llama and Qwen2 as huggingface/nanotron lays them out, parameter by parameter, against the Hub's names.

`RULES` is the whole mapping, read in both directions: one nanotron parameter is one or more Hub tensors stacked on
dimension 0. Everything else here computes with it: shapes, the slices each tensor-parallel rank owns, and the
pipeline rank each block lives on. nanotron gives Llama and Qwen2 the same parameter names, so one table serves both.

Source of the layout: nanotron at commit 2411b022 (checkpoint format 1.5), `models/llama.py`, `models/qwen.py`,
`parallel/sharded_parameters.py`, `models/base.py`, and checkpoints written by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """One Hub tensor inside a nanotron parameter: its name, its rows (a key of `Architecture.sizes`), and whether
    rotary embeddings act on its rows."""

    hub: str
    rows: str
    rotary: bool = False


@dataclass(frozen=True)
class Rule:
    """One nanotron parameter: the Hub tensors stacked in it, its columns (`None`: a vector), the dimension tensor
    parallelism cuts inside every part (`None`: replicated), and the `Architecture` flag it exists under."""

    nanotron: str
    parts: tuple[Part, ...]
    columns: str | None
    cut: int | None
    when: str | None = None


_LAYER, _HUB_LAYER = "model.decoder.{layer}.pp_block", "model.layers.{layer}"


def _qkv(kind: str) -> tuple[Part, ...]:
    return (
        Part(f"{_HUB_LAYER}.self_attn.q_proj.{kind}", "query", rotary=True),
        Part(f"{_HUB_LAYER}.self_attn.k_proj.{kind}", "key_value", rotary=True),
        Part(f"{_HUB_LAYER}.self_attn.v_proj.{kind}", "key_value"),
    )


_EMBEDDING = Part("model.embed_tokens.weight", "vocabulary")
_INPUT_NORM = Part(f"{_HUB_LAYER}.input_layernorm.weight", "hidden")
_MLP_NORM = Part(f"{_HUB_LAYER}.post_attention_layernorm.weight", "hidden")
_O = Part(f"{_HUB_LAYER}.self_attn.o_proj.weight", "hidden")
_GATE, _UP = (Part(f"{_HUB_LAYER}.mlp.{name}_proj.weight", "mlp") for name in ("gate", "up"))
_DOWN = Part(f"{_HUB_LAYER}.mlp.down_proj.weight", "hidden")

# In model order, which is also the order of pipeline blocks.
RULES = (
    Rule("model.token_position_embeddings.pp_block.token_embedding.weight", (_EMBEDDING,), "hidden", cut=0),
    Rule(f"{_LAYER}.input_layernorm.weight", (_INPUT_NORM,), None, cut=None),
    Rule(f"{_LAYER}.attn.qkv_proj.weight", _qkv("weight"), "hidden", cut=0),
    Rule(f"{_LAYER}.attn.qkv_proj.bias", _qkv("bias"), None, cut=0, when="qkv_bias"),
    Rule(f"{_LAYER}.attn.o_proj.weight", (_O,), "query", cut=1),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", (_MLP_NORM,), None, cut=None),
    Rule(f"{_LAYER}.mlp.gate_up_proj.weight", (_GATE, _UP), "hidden", cut=0),
    Rule(f"{_LAYER}.mlp.down_proj.weight", (_DOWN,), "mlp", cut=1),
    Rule("model.final_layer_norm.pp_block.weight", (Part("model.norm.weight", "hidden"),), None, cut=None),
    Rule("model.lm_head.pp_block.weight", (Part("lm_head.weight", "vocabulary"),), "hidden", cut=0, when="untied"),
)


@dataclass(frozen=True)
class Architecture:
    """The numbers of one model that shape its parameters.

    `rope_interleaved` says that rows (2i, 2i+1) of a head rotate together; on the Hub it is always (i, i+head_dim/2).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    qkv_bias: bool
    untied: bool
    rope_interleaved: bool

    @property
    def head_dim(self) -> int:
        """Rows of one attention head; nanotron knows no other head size than this."""
        return self.hidden // self.heads

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions `RULES` speaks of."""
        return {
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "query": self.heads * self.head_dim,
            "key_value": self.kv_heads * self.head_dim,
            "mlp": self.mlp,
        }


@dataclass(frozen=True)
class HubTensor:
    """A Hub tensor that is part of a `Parameter`: name, whole shape, whether rotary embeddings act on its rows."""

    name: str
    shape: tuple[int, ...]
    rotary: bool


@dataclass(frozen=True)
class Parameter:
    """A `Rule` for one model and one layer: nanotron's dotted name, and `parts` stacked on dimension 0."""

    name: str
    parts: tuple[HubTensor, ...]
    cut: int | None

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(part.shape[0] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter, before tensor parallelism: `(sum of rows, *columns)`."""
        return (sum(self.rows), *self.parts[0].shape[1:])

    @property
    def block(self) -> str:
        """nanotron's pipeline block that holds the parameter, e.g. `model.decoder.3`."""
        return self.name.split(".pp_block.")[0]


def parameters(architecture: Architecture) -> list[Parameter]:
    """Every parameter of the model, in model order."""

    def build(rule: Rule, layer: int) -> Parameter:
        sizes = architecture.sizes
        columns = () if rule.columns is None else (sizes[rule.columns],)
        parts = tuple(
            HubTensor(part.hub.format(layer=layer), (sizes[part.rows], *columns), part.rotary) for part in rule.parts
        )
        return Parameter(rule.nanotron.format(layer=layer), parts, rule.cut)

    active = [rule for rule in RULES if rule.when is None or getattr(architecture, rule.when)]
    of_layer = [rule for rule in active if "{layer}" in rule.nanotron]
    first, last = active.index(of_layer[0]), active.index(of_layer[-1])
    return [
        *(build(rule, 0) for rule in active[:first]),
        *(build(rule, layer) for layer in range(architecture.layers) for rule in of_layer),
        *(build(rule, 0) for rule in active[last + 1 :]),
    ]


def shard_slices(parameter: Parameter, tp: int, rank: int) -> list[tuple[Slices, Slices]]:
    """What tensor-parallel rank `rank` of `tp` holds: pairs (where in its shard, where in the whole parameter).

    Stacked parts are cut one by one, so that a rank's shard is its share of q, then of k, then of v. A parameter of
    one part leaves the local slice open, as nanotron does.
    """
    cut, shape = parameter.cut, parameter.shape
    if cut is None:
        raise ValueError(f"{parameter.name} is replicated over tensor parallelism: it has no shards.")

    def along_cut(interval: slice) -> Slices:
        return tuple(interval if dim == cut else slice(None) for dim in range(len(shape)))

    blocks = parameter.rows if len(parameter.parts) > 1 else (shape[cut],)
    if any(size % tp for size in blocks):
        raise ValueError(f"tp={tp} does not divide {parameter.name}, which has parts of {list(blocks)} rows or columns")
    pairs = []
    for start, size in zip(accumulate(blocks, initial=0), blocks, strict=False):
        share = size // tp
        local = slice(None) if len(blocks) == 1 else slice(start // tp, start // tp + share)
        pairs.append((along_cut(local), along_cut(slice(start + rank * share, start + (rank + 1) * share))))
    return pairs


def place_blocks(architecture: Architecture, pp: int) -> dict[str, int]:
    """The pipeline rank of every block, by nanotron's own rule.

    nanotron fills the stages in order and moves on once the compute so far *exceeds* the stage's equal share, where
    a decoder layer costs its matrix sizes and the head its own, so that a large vocabulary thins out the last stage.
    Following it, a run with this pp finds the files under the very names it looks for first.
    """
    ranks = _fill_stages(architecture, max(pp, 1))
    if max(ranks.values()) != pp - 1:
        works = [n for n in range(1, architecture.layers + 2) if max(_fill_stages(architecture, n).values()) == n - 1]
        raise ValueError(
            f"pp={pp}: nanotron's balancing leaves stages empty for {architecture.layers} layers; use one of {works}."
        )
    return ranks


def _fill_stages(architecture: Architecture, pp: int) -> dict[str, int]:
    hidden = architecture.hidden
    layer_cost = 4 * architecture.sizes["query"] * hidden + 3 * architecture.mlp * hidden
    costs = {
        "model.token_position_embeddings": 0,
        **{f"model.decoder.{layer}": layer_cost for layer in range(architecture.layers)},
        "model.final_layer_norm": 0,
        "model.lm_head": architecture.vocabulary * hidden,
    }
    total, stage, ranks = sum(costs.values()), 0, {}
    for block, cost_so_far in zip(costs, accumulate(costs.values()), strict=True):
        ranks[block] = stage
        # The float product is nanotron's: an exact comparison could place a block elsewhere.
        if cost_so_far > total * ((stage + 1) / pp):
            stage += 1
    return ranks


# Rows that fill up a vocabulary take part in nanotron's softmax, so adding them is not the converter's to decide.
_PADS = " nanotron cuts a vocabulary into equal parts; resize_token_embeddings(pad_to_multiple_of=...) makes it longer."


def check_tp(architecture: Architecture, tp: int) -> None:
    """Refuse a tensor-parallel size that nanotron could not cut this model by."""
    counts = {
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "intermediate_size": architecture.mlp,
        "vocab_size": architecture.vocabulary,
    }
    indivisible = {name: count for name, count in counts.items() if tp < 1 or count % tp}
    if indivisible:
        works = [n for n in range(1, architecture.kv_heads + 1) if not any(count % n for count in counts.values())]
        named = ", ".join(f"{name}={count}" for name, count in indivisible.items())
        raise ValueError(
            f"tp={tp} does not divide {named}; use one of {works}.{_PADS if 'vocab_size' in indivisible else ''}"
        )


def unstack(whole: torch.Tensor, parameter: Parameter, index: int, architecture: Architecture) -> torch.Tensor:
    """Part `index` of the nanotron parameter `whole`, `(sum of rows, *columns)`, as the Hub has it: `(rows, *columns)`.

    A part has memory of its own, so that it does not keep the stack alive; the only part of a parameter is `whole`.
    """
    if len(parameter.parts) == 1:
        return whole
    part, start = parameter.parts[index], sum(parameter.rows[:index])
    tensor = whole[start : start + part.shape[0]]
    if part.rotary and architecture.rope_interleaved:
        return tensor.unflatten(0, (-1, architecture.head_dim // 2, 2)).transpose(1, 2).reshape(part.shape)
    return tensor.clone()
