"""A loss that is not the model's own trains and evaluates as with stock `transformers.Trainer` in one process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny import VOCABULARY, History, pad_batch, random_dataset, tiny_config, training_arguments
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments
from hf_nanotron.prepare.neftune import EmbeddingNoise
from hf_nanotron.training.run_report import report_memory

STEPS, SAMPLES, EVALUATED = 2, 40, 7  # the evaluation sees the weights after the second step
TOLERANCE = {"losses": 2e-5, "norms": 1e-4, "eval": 2e-5}
Figures = dict[str, list[float]]


@functools.cache
def checkpoint(family: str = "llama", layers: int = 2, **overrides: Any) -> str:
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    config = tiny_config(family, initializer_range=0.3, num_hidden_layers=layers, **overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


# ---- losses ----


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Weighs late tokens more, penalises all logits, also those of padding; sees the tensors that stock hands it."""
    logits = outputs.logits
    assert outputs.loss is None and logits.shape == (*labels.shape, VOCABULARY) and logits.dtype == torch.float32
    assert num_items_in_batch.dtype == torch.float32
    losses = F.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten(), reduction="none").view(labels.shape)
    weights = torch.linspace(0.5, 1.5, labels.shape[1])
    loss = (losses * weights).sum() / num_items_in_batch + 1e-3 * logits.square().mean()
    return loss if outputs.get("aux_loss") is None else loss + 0.5 * outputs.aux_loss


def dft_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """As TRL's `loss_type="dft"`: each token is weighed by its own probability."""
    target = shifted(labels)
    mask = target != -100
    logprobs = outputs.logits.log_softmax(-1).gather(-1, target.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    per_token = -logprobs.exp().detach() * logprobs
    return (per_token * mask).sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def of_hidden_states(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Reads what the layers return, also at padding, as one tensor."""
    states = outputs.hidden_states
    assert states[0].shape[:2] == labels.shape == states[-1].shape[:2]
    return (
        weighted(outputs, labels, num_items_in_batch)
        + states[1].std()
        + 1e-2 * (states[-1] - states[0]).square().mean()
    )


def of_attention(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return weighted(outputs, labels, num_items_in_batch) + outputs.attentions[0].square().mean()


def entropy(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    assert labels is None and num_items_in_batch is None
    logprobs = outputs.logits.log_softmax(-1)
    return (logprobs.exp() * logprobs).sum(-1).mean()


def squared(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """As a `loss_function` of the model's."""
    assert logits.shape[-1] == vocab_size
    logits, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.square().sum() / kwargs["num_items_in_batch"]


# ---- models ----


class DoublingForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if output.loss is not None:
            output.loss *= 2  # in place: the same tensor is returned
        return output


class OwnCrossEntropyForCausalLM(LlamaForCausalLM):
    """Older remote code: no `**kwargs`, a mean over the batch, and a term of the hidden states. Returns a tuple."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, return_dict: Any = None
    ) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        assert hidden.shape[:2] == input_ids.shape
        logits = self.lm_head(hidden)
        if labels is None:
            return CausalLMOutputWithPast(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss + 1e-2 * hidden.square().mean() + 1e-3 * (logits * (input_ids > 9).unsqueeze(-1)).mean(), logits


class DistilledForCausalLM(LlamaForCausalLM):
    """Takes what a teacher would say as a column of the batch."""

    def forward(self, input_ids: Any = None, labels: Any = None, teacher: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None and teacher is not None:
            logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, teacher[:, :-1])
            output.loss = output.loss - (logprobs * (labels[:, 1:, None] != -100)).sum() / kwargs["num_items_in_batch"]
        return output


def with_teacher(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Two tokens that a teacher finds likely at each position `[B, S, 2]`."""
    batch = pad_batch(rows)
    return {**batch, "teacher": torch.stack((batch["input_ids"], (batch["input_ids"] + 1) % VOCABULARY), -1)}


def without_labels(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": pad_batch(rows)["input_ids"]}


class QuietForCausalLM(LlamaForCausalLM):
    """A forward of its own that changes nothing, unless told so later."""

    factor = 1.0

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if self.factor != 1.0:
            output.loss = output.loss * self.factor
        return output


def change_loss(module: Any, args: Any, output: Any) -> Any:
    if output.loss is not None:
        output.loss = output.loss * 3 + 1e-2 * output.logits.mean()
    return output


def cap(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
    """Not element by element: it would be another on a slice of the vocabulary."""
    assert logits.shape[-1] == VOCABULARY
    return logits - logits.logsumexp(-1, keepdim=True) * 0.5


def asking(name: str) -> Callable[[Any], Any]:
    return lambda model: setattr(model.config, name, True)


def mix(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden - 0.5 * hidden.mean(1, keepdim=True)


def scale(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * 0.7


def hooked(name: str) -> Callable[[Any], Any]:
    return lambda model: model.get_submodule(name).register_forward_hook(change_loss)


# ---- trainers ----


def times_ten(base: Any) -> Any:
    class TimesTen(base):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            return (result[0] * 10, result[1]) if isinstance(result, tuple) else result * 10

    return TimesTen


def from_logits(base: Any) -> Any:
    class FromLogits(base):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return (loss, outputs) if return_outputs else loss

    return FromLogits


def by_parts(base: Any) -> Any:
    """Calls the backbone and the head by themselves, and the loss function of the model."""

    class ByParts(base):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            logits = model.lm_head(hidden)
            loss = model.loss_function(logits, labels, VOCABULARY, num_items_in_batch=num_items_in_batch)
            loss = loss + 1e-3 * logits.logsumexp(-1).square().mean() + 1e-2 * hidden.std()
            return (loss, CausalLMOutputWithPast(logits=logits)) if return_outputs else loss

    return ByParts


def with_columns(base: Any) -> Any:
    """Takes a column of the batch for itself, whose form no model knows."""

    class WithColumns(base):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            teacher = inputs.pop("teacher")
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss - 1e-2 * outputs.logits.log_softmax(-1).gather(-1, teacher).mean()
            return (loss, outputs) if return_outputs else loss

    return WithColumns


def like_sft(base: Any) -> Any:
    class LikeSft(base):
        def __init__(self, *args: Any, loss_type: str, **kwargs: Any) -> None:
            super().__init__(*args, compute_loss_func={"dft": dft_loss}[loss_type], **kwargs)

    return LikeSft


def unscaled(base: Any) -> Any:
    return type("Unscaled", (base,), {"loss_is_scaled_for_ga": False})


# What differs from a plain run: of the model's class, of a model, the class of the trainer, its arguments.
KINDS: dict[str, dict[str, Any]] = {
    "compute_loss_func": {"kwargs": {"compute_loss_func": weighted}},
    "dft": {"trainer": like_sft, "kwargs": {"loss_type": "dft"}},
    "loss_function": {"prepare": lambda model: setattr(model, "loss_function", squared)},
    "label smoothing": {"args": {"label_smoothing_factor": 0.2}},
    "doubling forward": {"model": DoublingForCausalLM},
    "own cross-entropy": {"model": OwnCrossEntropyForCausalLM},
    "distillation": {"model": DistilledForCausalLM, "kwargs": {"data_collator": with_teacher}},
    "lm_head hook": {"prepare": lambda model: model.lm_head.register_forward_hook(cap)},
    "unscaled": {"trainer": unscaled},
    "compute_loss": {"trainer": times_ten},
    "compute_loss from logits": {"trainer": from_logits},
    "compute_loss around compute_loss_func": {"trainer": times_ten, "kwargs": {"compute_loss_func": weighted}},
    "compute_loss with columns": {
        "trainer": with_columns,
        "args": {"remove_unused_columns": False},
        "kwargs": {"data_collator": with_teacher},
    },
    "compute_loss by parts": {"trainer": by_parts},
    "hidden states": {"kwargs": {"compute_loss_func": of_hidden_states}, "prepare": asking("output_hidden_states")},
    "model hook": {"prepare": lambda model: model.register_forward_hook(change_loss)},
    "model hook over a forward": {"model": DoublingForCausalLM, "prepare": hooked("")},
}
WHOLE = tuple(kind for kind in KINDS if kind.startswith(("compute_loss ", "model hook")) or kind == "compute_loss")
CHOICE = ("compute_loss_func", "own cross-entropy", "lm_head hook", "compute_loss")
STAGED = tuple(kind for kind in KINDS if kind not in (*WHOLE, "hidden states"))


def build(kind: str, directory: str, base: Any, arguments: Any, history: History, **overrides: Any) -> Any:
    spec = KINDS[kind]
    model = spec.get("model", AutoModelForCausalLM).from_pretrained(directory)
    spec.get("prepare", lambda model: None)(model)
    args = arguments(
        **training_arguments(
            max_steps=STEPS,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            **spec.get("args", {}) | overrides,
        )
    )
    return spec.get("trainer", lambda base: base)(base)(
        model=model,
        args=args,
        train_dataset=random_dataset(SAMPLES, ragged=True, length=15),
        eval_dataset=random_dataset(EVALUATED, ragged=True, length=13, seed=4),
        callbacks=[history],
        **{"data_collator": pad_batch, **spec.get("kwargs", {})},
    )


def figures(kind: str, directory: str, base: Any, arguments: Any, **overrides: Any) -> Figures:
    history = History()
    trainer = build(kind, directory, base, arguments, history, **overrides)
    trainer.train()
    result = {"losses": history.losses, "norms": history.norms, "eval": [trainer.evaluate()["eval_loss"]]}
    if base is NanotronTrainer:
        trainer.model.mesh.close()
    return result


@functools.cache
def expected(kind: str, directory: str, accumulation: int, **overrides: Any) -> Figures:
    return figures(kind, directory, Trainer, TrainingArguments, gradient_accumulation_steps=accumulation, **overrides)


def run(kinds: tuple[str, ...], directory: str, overrides: dict[str, Any]) -> dict[str, Figures]:
    return {kind: figures(kind, directory, NanotronTrainer, NanotronTrainingArguments, **overrides) for kind in kinds}


def errors(got: Figures, wanted: Figures) -> dict[str, float]:
    return {name: max(abs(a - b) / abs(b) for a, b in zip(got[name], wanted[name], strict=True)) for name in TOLERANCE}


def check(
    pool: WorkerPool, kinds: tuple[str, ...], directory: str, dp: int, sizes: dict[str, Any], accumulation: int = 2
) -> None:
    world = dp * sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    everyone = pool.run(world, run, kinds, directory, {**sizes, "gradient_accumulation_steps": accumulation})
    found = {}
    for kind in kinds:
        assert all(got[kind] == everyone[0][kind] for got in everyone), f"{kind}: ranks report different figures"
        found[kind] = errors(everyone[0][kind], expected(kind, directory, dp * accumulation))
    wrong = {kind: error for kind, error in found.items() if any(error[n] > TOLERANCE[n] for n in TOLERANCE)}
    assert not wrong, wrong


TOPOLOGIES: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {  # kinds, data-parallel ranks, sizes
    "tp 2 sp": (tuple(kind for kind in KINDS if kind not in ("dft", "unscaled")), 1, {"tp_size": 2}),
    "tp 2": (CHOICE, 1, {"tp_size": 2, "sequence_parallel": False}),
    "dp 2": ((*CHOICE, "unscaled", "label smoothing", "compute_loss from logits", "model hook"), 2, {}),
    "pp 2": (STAGED, 1, {"pp_size": 2}),
    "tp 2 pp 2": (("compute_loss_func", "distillation", "lm_head hook"), 1, {"tp_size": 2, "pp_size": 2}),
    "dp 2 zero 3": (CHOICE, 2, {"zero_stage": 3}),
    "pp 2 dp 2 zero 2": (("compute_loss_func", "own cross-entropy"), 2, {"pp_size": 2, "zero_stage": 2}),
    "pp 2 zb": (("compute_loss_func", "own cross-entropy"), 1, {"pp_size": 2, "pp_schedule": "zb"}),
    "pp 2 interleaved": (
        ("compute_loss_func", "own cross-entropy"),
        1,
        {"pp_size": 2, "pp_virtual_stages": 2, "pp_schedule": "interleaved_1f1b"},
    ),
    "tp 2 recomputed, compiled": (
        ("compute_loss_func",),
        1,
        {"tp_size": 2, "gradient_checkpointing": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
    ),
}


# A loss of the user knows no shards of weights; ZeRO 2 is next to stages.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full_matrix] * (name == "dp 2 zero 3")) for name in TOPOLOGIES]
)
def test_a_loss_of_the_users(pool: WorkerPool, name: str) -> None:
    """Loss, gradient norm and evaluation of every kind."""
    kinds, dp, sizes = TOPOLOGIES[name]
    directory = checkpoint(layers=4) if "interleaved" in name else checkpoint()
    check(pool, kinds, directory, dp, sizes, 4 if "pp_schedule" in sizes else 2)


def mean_of_tokens(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    losses = F.cross_entropy(outputs.logits.flatten(0, 1), shifted(labels).flatten(), reduction="sum")
    return losses / num_items_in_batch


def mean_of_batch(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), shifted(labels).flatten())


KINDS |= {"plain": {}, "tokens": {"kwargs": {"compute_loss_func": mean_of_tokens}}}
KINDS |= {"batches": {"kwargs": {"compute_loss_func": mean_of_batch}}}


def test_each_rank_weighs_equally(pool: WorkerPool) -> None:
    """`average_tokens_across_devices=False`: a rank's function gets its own count; ranks are averaged, as in DDP."""
    each = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 1}
    got = pool.run(2, run, ("plain", "tokens", "batches"), checkpoint(), each)[0]
    assert max(errors(got["tokens"], got["plain"]).values()) < 2e-5
    assert max(errors(got["batches"], got["plain"]).values()) < 2e-5


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "ep_size": 2}, {"pp_size": 2}], ids=["tp 2 ep 2", "pp 2"])
def test_a_mixture_of_experts(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    """The losses over routers are added where the stock forward adds them; a loss of its outputs finds `aux_loss`."""
    kinds = ("loss_function", "compute_loss_func", *(() if "pp_size" in sizes else ("compute_loss", "model hook")))
    check(pool, kinds, checkpoint("mixtral", **MIXTURE), 1, sizes)


def predicted_shapes(directory: str, sizes: dict[str, Any], trainer_class: Any = None) -> list[list[list[int]]]:
    """Of the parts of `predictions`, with the plain loss and with one of the outputs."""
    arguments = {"per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, **sizes}
    shapes = []
    for loss in (None, from_outputs):
        if trainer_class is None:
            args: Any = NanotronTrainingArguments(**training_arguments(**arguments))
            model: Any = ParallelAuto.from_pretrained(directory, parallel=args.parallel)
        else:
            args = TrainingArguments(**training_arguments(**arguments))
            model = AutoModelForCausalLM.from_pretrained(directory)
        trainer = (trainer_class or NanotronTrainer)(
            model=model, args=args, data_collator=pad_batch, compute_loss_func=loss
        )
        found = trainer.predict(random_dataset(5)).predictions
        parts = found if isinstance(found, tuple) else (found,)
        shapes.append([list(getattr(part, "shape", [])) for part in parts])
    return shapes


def from_outputs(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.float().square().mean()


def test_predictions_of_a_mixture(pool: WorkerPool) -> None:
    """Logits alone; with a loss of the outputs, what these have where stock outputs have it, on every layout."""
    directory = checkpoint("mixtral", **MIXTURE)
    theirs = predicted_shapes(directory, {}, Trainer)
    logits = [5, 16, VOCABULARY]
    assert all(shapes[:2] == [[3], logits] and len(shapes) == 3 for shapes in theirs)
    for sizes in ({}, {"pp_size": 2}):
        (found, *_) = pool.run(2, predicted_shapes, directory, sizes)
        assert found == [[logits], [[3], logits]], sizes


# ---- noise on embeddings ----


def train_with_noise(directory: str, overrides: dict[str, Any]) -> list[float]:
    history = History()
    build("compute_loss_func", directory, NanotronTrainer, NanotronTrainingArguments, history, **overrides).train()
    return history.losses


def test_neftune_is_the_same_on_every_topology(pool: WorkerPool) -> None:
    """Also where sequences are filled up. It is not that of stock, which draws from the global generator."""
    noisy = {"neftune_noise_alpha": 8.0}
    alone = pool.run(1, train_with_noise, checkpoint(), {**noisy, "gradient_accumulation_steps": 4})[0]
    quiet = expected("compute_loss_func", checkpoint(), 4)["losses"]
    assert all(abs(a - b) > 1e-3 * b for a, b in zip(alone, quiet, strict=True))
    for sizes in ({"tp_size": 2, "pp_size": 2}, {"tp_size": 2}):
        dp = 4 // (sizes["tp_size"] * sizes.get("pp_size", 1))
        got = pool.run(4, train_with_noise, checkpoint(), {**noisy, **sizes, "gradient_accumulation_steps": 4 // dp})
        for losses in got:
            assert losses == pytest.approx(alone, rel=2e-5)


def test_neftune_noise_is_as_large_as_in_stock() -> None:
    """Uniform up to `alpha / sqrt(tokens * width)`, other for each micro-batch; what fills a sequence up gets none."""
    noise, embedding = EmbeddingNoise(8.0, seed=3), torch.nn.Embedding(4, 16)
    found = []
    for micro_batch in (0, 1, 0):
        noise.begin(5, micro_batch, length=9)
        found.append(noise.add(embedding, (), torch.zeros(64, 10, 16)))
    most = 8.0 / (9 * 16) ** 0.5
    assert found[0] is not None and found[1] is not None and found[2] is not None
    assert 0.99 * most < found[0].abs().max() <= most and abs(found[0].mean()) < 0.05 * most
    assert not found[0][:, 9].any() and not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    noise.end()
    assert noise.add(embedding, (), torch.zeros(1, 1, 16)) is None and noise.add(embedding.eval(), (), found[0]) is None


# ---- precision ----


def evaluate_in_bf16(directory: str, sizes: dict[str, Any]) -> tuple[float, float]:
    made = []
    for full in (False, True):
        sizes = {**sizes, "bf16": True, "bf16_full_eval": full}
        history = History()
        trainer = build("compute_loss_func", directory, NanotronTrainer, NanotronTrainingArguments, history, **sizes)
        made.append(trainer.evaluate()["eval_loss"])
    return made[0], made[1]


def test_bf16_full_eval_is_what_bf16_does(pool: WorkerPool) -> None:
    for plain, full in pool.run(2, evaluate_in_bf16, checkpoint(), {"tp_size": 2}):
        assert plain == full


# ---- what is refused, and what is found out ----


class CallsTwiceForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        super().forward(input_ids=input_ids, **kwargs)
        return super().forward(input_ids=input_ids, **kwargs)


class ReadsLayersForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True, **kwargs)


class DoublingMixtureForCausalLM(MixtralForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        output.loss = output.loss * 2
        return output


def no_scalar(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.sum(-1)


def detached(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.detach().sum()


KINDS |= {
    "calls twice": {"model": CallsTwiceForCausalLM},
    "reads layers": {"model": ReadsLayersForCausalLM},
    "pre-hook": {"prepare": lambda model: model.register_forward_pre_hook(lambda *_: None)},
    "backward hook": {"prepare": lambda model: model.register_full_backward_hook(lambda *_: None)},
    "backbone hook": {"prepare": hooked("model")},
    "no scalar": {"kwargs": {"compute_loss_func": no_scalar}},
    "detached": {"kwargs": {"compute_loss_func": detached}},
    "z-loss": {"kwargs": {"compute_loss_func": weighted}, "args": {"z_loss_coefficient": 1e-3}},
    "quiet": {"model": QuietForCausalLM},
    "late forward": {},
    "mixture": {"model": DoublingMixtureForCausalLM},
}
REFUSED = {  # under pp 2, in the constructor: what the message has
    "compute_loss": ("TimesTen.compute_loss", "compute_loss_func", "pp_size=1"),
    "model hook": ("hook on the model (change_loss)", "pp_size=1"),
    "pre-hook": ("hook on the model", "pp_size=1"),
    "backward hook": ("backward hook",),
    "backbone hook": ("hook on model (change_loss)", "pp_size=1"),
    "calls twice": ("CallsTwiceForCausalLM", "2 times"),
    "hidden states": ("output_hidden_states=True", "pp_size=1"),
    "reads layers": ("ReadsLayersForCausalLM", "output_hidden_states"),
    "z-loss": ("z_loss_coefficient=0.001", "logsumexp"),
}
LATE = {  # in train()
    "compute_loss": lambda trainer: setattr(trainer, "compute_loss", lambda *args, **kwargs: None),
    "model hook": lambda trainer: trainer.model.register_forward_hook(change_loss),
    "model forward": lambda trainer: assign_forward(trainer.model),
}


def caught(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing"


def refusals(directory: str) -> dict[str, str]:
    sizes = {"pp_size": 2, "gradient_accumulation_steps": 2}

    def make(kind: str) -> Any:
        return build(kind, directory, NanotronTrainer, NanotronTrainingArguments, History(), **sizes)

    messages = {kind: caught(lambda kind=kind: make(kind)) for kind in REFUSED}
    for kind, act in LATE.items():
        trainer = make("dft")
        act(trainer)
        messages[f"late {kind}"] = caught(trainer.train)
    return messages


def test_what_a_pipeline_refuses(pool: WorkerPool) -> None:
    everyone = pool.run(2, refusals, checkpoint())
    for messages in everyone:
        for kind, parts in REFUSED.items():
            assert all(part in messages[kind] for part in parts), f"{kind}: {messages[kind]}"
        for kind in LATE:
            assert "pp_size=2" in messages[f"late {kind}"], messages[f"late {kind}"]


def make_alone(kind: str, **overrides: Any) -> Any:
    return build(kind, checkpoint(), NanotronTrainer, NanotronTrainingArguments, History(), **overrides)


KINDS |= {
    "attention weights": {
        "kwargs": {"compute_loss_func": of_attention},
        "prepare": lambda model: (model.set_attn_implementation("eager"), asking("output_attentions")(model)),
    },
    "mixing hook": {"prepare": lambda model: model.model.layers[0].register_forward_hook(mix)},
    "scaling hook": {"prepare": lambda model: model.model.layers[0].register_forward_hook(scale)},
    "no labels": {"kwargs": {"compute_loss_func": entropy, "data_collator": without_labels}},
}


def parts_of_a_model(directory: str) -> tuple[dict[str, str], Figures]:
    sizes = {"tp_size": 2, "gradient_accumulation_steps": 2}
    messages = {}
    for kind in ("attention weights", "mixing hook"):
        messages[kind] = caught(
            lambda kind=kind: build(
                kind, directory, NanotronTrainer, NanotronTrainingArguments, History(), **sizes
            ).train()
        )
    return messages, figures("scaling hook", directory, NanotronTrainer, NanotronTrainingArguments, **sizes)


def test_what_a_rank_has_in_part(pool: WorkerPool) -> None:
    """A hook in front of the cut is tried: it passes if the cut model computes what the whole one did."""
    for messages, got in pool.run(2, parts_of_a_model, checkpoint()):
        assert "tp_size=2" in messages["attention weights"] and "of its own heads" in messages["attention weights"]
        assert "mix (a hook on model.layers.0) computes a loss of" in messages["mixing hook"]
        found = errors(got, expected("scaling hook", checkpoint(), 2))
        assert all(found[name] <= TOLERANCE[name] for name in TOLERANCE), found


def without(directory: str, base: Any, arguments: Any, **overrides: Any) -> list[float]:
    history = History()
    build("no labels", directory, base, arguments, history, **overrides).train()
    return history.losses + history.norms


def test_a_loss_that_needs_no_labels(pool: WorkerPool) -> None:
    wanted = without(checkpoint(), Trainer, TrainingArguments, gradient_accumulation_steps=2)
    for got in pool.run(2, without, checkpoint(), NanotronTrainer, NanotronTrainingArguments):
        assert got == pytest.approx(wanted, rel=1e-4)


def test_a_mixture_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DoublingMixture.*router losses.*output_router_logits=False"):
        build("mixture", checkpoint("mixtral", **MIXTURE), NanotronTrainer, NanotronTrainingArguments, History())
    quiet = checkpoint("mixtral", **{**MIXTURE, "output_router_logits": False})
    build("mixture", quiet, NanotronTrainer, NanotronTrainingArguments, History()).train()


def assign_forward(model: Any) -> None:
    old = model.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return change_loss(model, args, old(*args, **kwargs))

    model.forward = forward


def test_a_forward_assigned_to_an_instance() -> None:
    """Of a stock model it would run around what is cut; of a parallel one it runs as a hook would."""
    stock = AutoModelForCausalLM.from_pretrained(checkpoint())
    assign_forward(stock)
    args = NanotronTrainingArguments(**training_arguments())
    with pytest.raises(ValueError, match="model.forward was replaced.*subclass"):
        NanotronTrainer(model=stock, args=args)
    trainer = make_alone("late forward", gradient_accumulation_steps=2)
    assign_forward(trainer.model)
    trainer.train()
    losses = next(c for c in trainer.callback_handler.callbacks if isinstance(c, History)).losses
    assert losses == pytest.approx(expected("model hook", checkpoint(), 2)["losses"], rel=2e-5)


@pytest.mark.parametrize(("kind", "part"), [("no scalar", "one element"), ("detached", "no gradient")])
def test_what_is_no_loss(kind: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        make_alone(kind).train()


def test_a_plain_run_makes_no_logits() -> None:
    """Nor one whose own forward changes nothing; and whole logits are in the report of the memory."""
    reports = {}
    for kind in ("quiet", "doubling forward", "calls twice"):
        trainer = make_alone(kind)
        assert trainer.model.makes_logits == (kind != "quiet")
        trainer.create_optimizer()
        made = trainer.args, trainer.training_state, trainer.optimizer
        reports[kind] = report_memory(*made, trainer.train_dataset).activations
    logits = 2 * 15 * VOCABULARY * 4
    assert reports["doubling forward"] - reports["quiet"] > 1.5 * logits  # three of them instead of one chunk


def test_a_forward_that_changes_its_loss_later() -> None:
    """One that the trial could not foresee: no advice to lower the learning rate."""
    trainer = make_alone("quiet")
    assert trainer.model.linear_head is not None
    trainer.model.factor = 2.0
    with pytest.raises(ValueError, match=r"forward of QuietForCausalLM changed its loss.*plain_forward = False"):
        trainer.train()
    trainer.model.plain_forward = False
    trainer.train()


# ---- a loss that comes while the trainer trains ----


class Sets(TrainerCallback):
    """Changes the loss at an event: of the whole run, or of its second step."""

    trainer: Any = None

    def __init__(self, event: str, kind: str) -> None:
        def change(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step != (event == "on_step_begin"):
                return
            if kind == "compute_loss_func":
                self.trainer.compute_loss_func = weighted
            else:
                model.register_forward_hook(change_loss)

        setattr(self, event, change)


SET_LATE = [(event, kind) for event in ("on_train_begin", "on_step_begin") for kind in ("compute_loss_func", "hook")]


def set_late(directory: str, base: Any, arguments: Any, overrides: dict[str, Any]) -> dict[str, list[float] | str]:
    results: dict[str, list[float] | str] = {}
    for event, kind in SET_LATE:
        callback, history = Sets(event, kind), History()
        callback.trainer = base(
            model=AutoModelForCausalLM.from_pretrained(directory),
            args=arguments(**training_arguments(max_steps=STEPS, gradient_accumulation_steps=2, **overrides)),
            train_dataset=random_dataset(SAMPLES, length=8),
            data_collator=pad_batch,
            callbacks=[history, callback],
        )
        try:
            callback.trainer.train()
            results[f"{event} {kind}"] = history.losses
        except ValueError as error:
            results[f"{event} {kind}"] = str(error)
    return results


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp 2", "pp 2"])
def test_a_loss_that_a_callback_sets(pool: WorkerPool, sizes: dict[str, Any]) -> None:
    wanted = set_late(checkpoint(), Trainer, TrainingArguments, {})
    assert len({tuple(losses) for losses in wanted.values()}) == len(SET_LATE)
    got = pool.run(2, set_late, checkpoint(), NanotronTrainer, NanotronTrainingArguments, sizes)
    assert got[0] == got[1]
    for name, losses in got[0].items():
        if "hook" in name and "pp_size" in sizes:
            assert "with a hook on the model" in losses
        else:
            assert losses == pytest.approx(wanted[name], rel=2e-5), name
