"""Seconds of one micro-batch in a decoder layer, in the head, and of an optimizer's step, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..parallel.config import ParallelConfig
from ..parallel.tp.loss import chunk_size
from . import efficiencies as counted
from .layer_work import LayerWork, ModelWork, seen_keys
from .links import collective_seconds
from .options import Options
from .rates import Rates, attention_rate, product_seconds

Parts = dict[str, float]


@dataclass
class Seconds:
    """Seconds of a micro-batch by part, in a forward, in a backward, and in its weight gradients."""

    forward: Parts = field(default_factory=dict)
    backward: Parts = field(default_factory=dict)
    weights: Parts = field(default_factory=dict)

    def add(self, other: Seconds) -> None:
        """Of one thing after another."""
        for mine, theirs in zip(self.phases, other.phases, strict=True):
            for part, seconds in theirs.items():
                mine[part] = mine.get(part, 0.0) + seconds

    @property
    def phases(self) -> tuple[Parts, Parts, Parts]:
        """Forward, backward, weight gradients."""
        return self.forward, self.backward, self.weights


@dataclass(frozen=True)
class MicroBatch:
    """What a rank gets of one micro-batch.

    Args:
        rows: samples.
        length: tokens of a row, filled up.
        documents: of a row.
        cp_size: ranks that share a row.
        attention_share: the work of the rank with most, over the mean: of attention alone.
    """

    rows: int
    length: int
    documents: tuple[int, ...]
    cp_size: int = 1
    attention_share: float = 1.0

    @property
    def tokens(self) -> float:
        """Of the rank: those that pass its matrices, of all tensor-parallel ranks."""
        return self.rows * self.length / self.cp_size


@dataclass(frozen=True)
class Place:
    """Where the rank is: ranks of its groups, as global numbers."""

    tp: Sequence[int]
    ep: Sequence[int]
    gpus_per_node: int


class LayerClock:
    """Seconds of layers under one set of rates and options."""

    def __init__(self, rates: Rates, options: Options, parallel: ParallelConfig, overlaps: bool, is_gpu: bool) -> None:
        self.rates, self.options, self.parallel, self.overlaps = rates, options, parallel, overlaps
        self.gain = counted.PRODUCTS_IN_STEP if is_gpu else 1.0
        self.kernel_factor = 1.0 if options.compiled else counted.EAGER
        self.memory = rates.memory
        self.wide = 1.0 if options.item == 2 else counted_wide(rates)

    def product(self, tokens: float, shape: tuple[int, int], kind: str) -> float:
        """Seconds of one product of a matrix (out, in)."""
        out, size = shape
        inner, outer = {"forward": (size, out), "input_gradient": (out, size), "weight_gradient": (size, out)}[kind]
        pieces = 2 if self.overlaps and kind != "weight_gradient" else 1
        return self.wide * pieces * product_seconds(self.rates, tokens / pieces, inner, outer, kind, self.gain)

    def fp8_product(self, tokens: float, shape: tuple[int, int]) -> float:
        """Seconds of one product in FP8."""
        assert self.rates.fp8 is not None
        moved = (tokens * sum(shape) * 1.5 + shape[0] * shape[1]) / self.memory
        return 2.0 * tokens * shape[0] * shape[1] / self.rates.fp8 + moved * 0.5

    def layer(self, work: LayerWork, index: int, hidden: int, batch: MicroBatch, place: Place) -> Seconds:
        """One layer, with what it recomputes and what it waits for."""
        found, tokens, item = Seconds(), batch.tokens, self.options.item
        tp = self.parallel.tp_size
        split = tokens / tp if self.parallel.sequence_parallel else tokens
        again: Parts = {}  # what a backward computes again
        policy = self.options.policy_of(index)
        self._matrices(found, again, work, index, tokens, split, policy)
        self._attention(found, again, work, batch, policy)
        passes = split * hidden * item * self.kernel_factor / self.memory
        rotary = tokens * (work.heads + work.kv_heads) * work.key_width * item * self.kernel_factor / self.memory
        moved = [h * passes + r * rotary for h, r in zip(counted.HIDDEN_PASSES, counted.ROTARY_PASSES, strict=True)]
        activated = work.activated * tokens + work.top_k * work.expert_activated * self._routed_tokens(tokens, split)
        activated *= item * self.kernel_factor / self.memory
        # Experts of one rank have a part of the features, or of the rows: `_routed_tokens`.
        moved = [m + a * activated for m, a in zip(moved, counted.ACTIVATED_PASSES, strict=True)]
        if work.top_k:
            rows = self._routed_tokens(tokens, split) * work.top_k * hidden * item * self.kernel_factor / self.memory
            moved = [m + p * rows for m, p in zip(moved, counted.EXPERT_PASSES, strict=True)]
        found.forward["memory"], found.backward["memory"] = moved
        if policy != "none":
            again["memory"] = moved[0]
        found.backward["recomputed"] = sum(again.values())
        overlaps = self.overlaps and not self.options.fp8_of(index)  # FP8 products run after the gather
        self._tensor_parallel(found, work, tokens, hidden, place, policy, overlaps)
        self._expert_parallel(found, work, tokens, split, hidden, place)
        self._host(found, work)
        return found

    def _routed_tokens(self, tokens: float, split: float) -> float:
        """Tokens whose experts' rows a rank has: with experts on other ranks, tensor-parallel ranks share them out."""
        return tokens / self.parallel.tp_size if self.parallel.ep_size > 1 else tokens

    def _matrices(
        self, found: Seconds, again: Parts, work: LayerWork, index: int, tokens: float, split: float, policy: str
    ) -> None:
        products: list[float] = [0.0, 0.0, 0.0]
        times: tuple[float, ...]
        fp8 = self.options.fp8_of(index) and self.rates.fp8 is not None
        repeated = quantised = 0.0
        for shape in (*work.mixing, *work.mlp):
            if fp8 and not any(size % 16 for size in shape):
                each = self.fp8_product(tokens, shape)
                quantised += counted.FP8_BYTES * tokens * (shape[0] + 0.5 * shape[1])
                quantised += counted.FP8_SUM_BYTES * shape[0] * shape[1]
                times = (each, each, each)
            else:
                times = tuple(
                    self.product(tokens, shape, kind) for kind in ("forward", "input_gradient", "weight_gradient")
                )
            products = [a + b for a, b in zip(products, times, strict=True)]
            if policy == "full" or (policy == "all_but_attention" and shape != work.last):
                repeated += times[0]
            if self.options.mlp_chunks and policy in ("none", "selective", "full") and shape in work.mlp:
                repeated += times[0] if shape != work.last else 0.0
        if work.expert and work.experts:
            rows = self._routed_tokens(tokens, split) * work.top_k * counted.UNEVEN
            for shape in work.expert:
                one = [
                    work.experts * self.product(rows / work.experts, shape, kind)
                    for kind in ("forward", "input_gradient", "weight_gradient")
                ]
                products = [a + b for a, b in zip(products, one, strict=True)]
                if policy == "full" or (policy == "all_but_attention" and shape != work.expert[-1]):
                    repeated += one[0]
        found.forward["products"], found.backward["products"], found.weights["products"] = products
        if quantised:
            found.forward["quantisation"] = 0.3 * quantised / self.memory
            found.backward["quantisation"] = 0.7 * quantised / self.memory
        again["products"] = repeated

    def _attention(self, found: Seconds, again: Parts, work: LayerWork, batch: MicroBatch, policy: str) -> None:
        if not work.heads:
            return
        keys = batch.rows * seen_keys(batch.documents, work.window) / batch.cp_size * batch.attention_share
        one = 2.0 * work.heads * (work.key_width + work.value_width) * keys * self.wide
        mean = sum(length * length for length in batch.documents) / max(1, sum(batch.documents))
        rate = attention_rate(self.rates, max(work.key_width, work.value_width), mean)
        moved = counted.ATTENTION_BYTES * batch.tokens * work.heads * work.key_width / self.memory
        moved *= self.options.item / 2
        found.forward["attention"] = one / rate.forward
        found.backward["attention"] = 2.5 * one / rate.backward + moved
        if policy == "full":
            again["attention"] = found.forward["attention"]

    def _tensor_parallel(
        self, found: Seconds, work: LayerWork, tokens: float, hidden: int, place: Place, policy: str, overlaps: bool
    ) -> None:
        if len(place.tp) < 2:
            return
        whole = tokens * hidden * self.options.item
        exchanges = counted.TP_EXCHANGES - (2 if work.expert and self.parallel.ep_size > 1 else 0)
        operation = "all_gather" if self.parallel.sequence_parallel else "all_reduce"
        times = exchanges if self.parallel.sequence_parallel else exchanges / 2
        sent = times * collective_seconds(self.rates, operation, whole, place.tp, place.gpus_per_node)
        for phase, work_beside in zip((found.forward, found.backward), (found.forward, found.weights), strict=True):
            shown = sent
            if overlaps:  # products hide what they can, and the rest shows
                shown = max(counted.TP_SHOWN * sent, sent - work_beside["products"])
                shown += exchanges * counted.TP_PASSES * whole / self.memory
            phase["tp"] = shown
        if policy == "full":  # gathers run again, and the sum that a recomputed norm needs
            found.backward["tp"] += found.forward["tp"]

    def _expert_parallel(
        self, found: Seconds, work: LayerWork, tokens: float, split: float, hidden: int, place: Place
    ) -> None:
        size = len(place.ep)
        if size < 2 or not work.expert:
            return
        elsewhere = 1.0 - work.experts / work.all_experts
        met = 1.0 - elsewhere**work.top_k  # whether a token needs any expert of one other rank
        rows = self._routed_tokens(tokens, split)
        # `nbytes` of an all-to-all is what goes to every rank, this one among them.
        nbytes = rows * hidden * self.options.item * met * size
        one = collective_seconds(self.rates, "all_to_all", nbytes, place.ep, place.gpus_per_node)
        found.forward["ep"] = found.backward["ep"] = 2 * one

    def _host(self, found: Seconds, work: LayerWork) -> None:
        """The gaps between kernels, and where the host is slower than the device."""
        launch = self.rates.launch / counted.LAUNCH
        found.forward["gaps"] = counted.LAYER_KERNELS / 3 * counted.GAP
        found.backward["gaps"] = 2 * found.forward["gaps"]
        host = counted.LAUNCHES * self.rates.launch
        waits = 0.0
        if work.expert and self.parallel.ep_size > 1 and not self.options.capacity:
            host, waits = counted.EXCHANGED_LAYER * launch, counted.EXCHANGE_WAIT * launch
        if not self.options.compiled:
            host *= 2
        device = sum(sum(phase.values()) for phase in found.phases)
        behind = max(0.0, host - device - waits)
        if behind or waits:
            found.forward["host"] = waits + behind / 3
            found.backward["host"] = behind * 2 / 3

    def head(self, work: ModelWork, batch: MicroBatch) -> Seconds:
        """Head and loss, which computes its gradients in the forward, a chunk of tokens at a time."""
        out, size = work.head
        tokens = batch.tokens
        chunk = chunk_size(round(tokens), out * self.options.item)
        chunks = tokens / chunk
        seconds = sum(
            self.product(chunk, (out, size), kind) for kind in ("forward", "input_gradient", "weight_gradient")
        )
        softmax = counted.LOGIT_PASSES * tokens * out * self.options.item / self.memory
        return Seconds(forward={"head": chunks * seconds + softmax})


def counted_wide(rates: Rates) -> float:
    """How much longer fp32 products take than those in 16 bits: not measured, by the data sheets of tensor cores
    (TF32 is half of bf16, and the highest precision of torch uses none). 1 where the rates are those of fp32."""
    return 1.0 if rates.made.get("dtype") == "float32" else 15.0


def optimizer_seconds(
    rates: Rates, options: Options, owned: float, matrices: Callable[[], Sequence[tuple[int, int]]], shards: int
) -> float:
    """Seconds of an optimizer's step and the norm before it.

    Args:
        owned: parameters of which this rank has the fp32 master.
        matrices: those of the layers of the rank, (out, in), of which Muon computes a share.
        shards: ranks that share them out.
    """
    name = options.optimizer
    moments = next((count for part, count in counted.MOMENTS.items() if part in name), 2)
    nbytes = owned * (counted.OPTIMIZER_BYTES + 2 * moments * options.moment)
    if "fused" not in name and options.item == 2:  # a pass of its own rounds the masters
        nbytes += owned * counted.ROUNDING_BYTES
    seconds = nbytes / rates.memory
    if "muon" in name:
        flops = 0.0
        for shape in matrices():
            short, long = sorted(shape)
            flops += counted.NEWTON_SCHULZ * (4.0 * short * short * long + 2.0 * short**3)
        known = rates.products[0]
        seconds += flops / shards / (known.flops / known.seconds)
    if options.state_offload:
        state = owned * options.state_offload * (4 + moments * options.moment)
        seconds += 2 * state / rates.host_copy
    return seconds
