"""`model.generate()` on every topology gives, token for token, what a stock model in one process gives.

The prompts have different lengths, are padded on the left, and reach beyond the sliding windows. Weights are drawn wide
enough that no greedy choice is close: `greedy` asserts the margin.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_runs import tiny_model
from pool import WorkerPool
from tiny import (
    FAMILIES,
    VOCABULARY,
    History,
    pad_batch,
    random_dataset,
    tiny_config,
    train_parallel,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TrainerCallback,
    pipeline,
    set_seed,
)

from hf_nanotron.models.stock.releases import OUTPUT_NAME, cache_in

PROMPTS = torch.tensor(
    [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [0, 0, 0, 20, 21, 22, 23, 24],
        [0, 0, 0, 0, 0, 33, 34, 35],
    ]
)
INPUTS = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long()}
NEW = 6  # 8 + 6 tokens: more than the sliding window of 6, in the prompt and after it
WINDOW = 6
INTERLEAVED = {"pp_size": 2, "pp_schedule": "interleaved_1f1b", "pp_virtual_stages": 2}
SPREAD: list[dict[str, Any]] = [{"tp_size": 2}, {"pp_size": 2}, {"tp_size": 2, "pp_size": 2}, INTERLEAVED]

Sizes = dict[str, Any]
Model = Any


@functools.cache
def checkpoint(family: str = "llama", layers: int = 2, tied: bool = False) -> str:
    """A Hub checkpoint of random weights, whose vocabulary two ranks do not divide, made in this process only."""
    overrides = {"max_window_layers": layers // 2} if family == "qwen2" else {}
    config = tiny_config(
        family,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        vocab_size=VOCABULARY + 11,
        **overrides,
    )
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def stock(directory: str, **options: Any) -> Any:
    """What stock transformers generates, in this process."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=options.pop("dtype", torch.float32)).eval()
    return model.generate(**{**INPUTS, "max_new_tokens": NEW, "do_sample": False, **options})


@functools.cache
def greedy(directory: str) -> list[list[int]]:
    output = stock(directory, return_dict_in_generate=True, output_logits=True)
    best = torch.stack(output.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, "a choice of the reference is too close to compare"
    return output.sequences.tolist()


def world_size(sizes: Sizes) -> int:
    return sizes.get("tp_size", 1) * sizes.get("pp_size", 1)


def layers_for(sizes: Sizes) -> int:
    return max(2, sizes.get("pp_size", 1) * sizes.get("pp_virtual_stages", 1))


def on_ranks(function: Callable[..., Any], sizes: Sizes, directories: list[str], *args: Any) -> list[Any]:
    """On a rank: `function(model, *args)` for the parallel model of each directory, over one mesh."""
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, ParallelConfig
    from hf_nanotron.parallel.mesh import ParallelMesh

    mesh = ParallelMesh(ParallelConfig(**sizes))
    results = [function(ParallelAuto.from_pretrained(directory, mesh=mesh), *args) for directory in directories]
    mesh.close()
    return results


def run(pool: WorkerPool, function: Callable[..., Any], sizes: Sizes, directory: str, *args: Any) -> list[Any]:
    """The results of `function(model, *args)` by rank."""
    return [result for (result,) in pool.run(world_size(sizes), on_ranks, function, sizes, [directory], *args)]


# ---- greedy ----


def generate(model: Model, **options: Any) -> Any:
    device = model.mesh.device
    inputs = {name: tensor.to(device) for name, tensor in INPUTS.items()}
    return model.generate(**{**inputs, "max_new_tokens": NEW, "do_sample": False, **options})


def generate_and_look(model: Model) -> dict[str, Any]:
    """Tokens, how many of them each forward was fed, and the shapes of this rank's cache."""
    fed: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"].shape[1]), with_kwargs=True)
    output = generate(model, return_dict_in_generate=True)
    hook.remove()
    heads = model.config.num_key_value_heads
    return {
        "tokens": output.sequences.tolist(),
        "fed": fed,
        "cache": [tuple(layer.keys.shape) for layer in cache_in(output).layers],
        "sliding": [layer.is_sliding for layer in cache_in(output).layers],
        "local": [index for stage in model.stages for index in stage.layers],
        "heads": max(1, heads // model.mesh.tp_size),
    }


def check_cache(result: dict[str, Any], head_dim: int) -> None:
    rows, length = len(PROMPTS), PROMPTS.shape[1] + NEW - 1  # the last token was never fed
    assert result["fed"] == [PROMPTS.shape[1]] + [1] * (NEW - 1)
    for index, shape in enumerate(result["cache"]):
        kept = WINDOW - 1 if result["sliding"][index] else length
        local = index in result["local"]
        assert shape == ((rows, result["heads"], kept, head_dim) if local else (rows, 1, kept, 1))


# Every family, tied and untied, where two ranks make it cheap; elsewhere each family once.
ALL = [(family, tied) for family in FAMILIES for tied in (False, True)]
HALF = [(family, index % 2 == 0) for index, family in enumerate(FAMILIES)]
GREEDY = {
    "one rank": ({}, HALF),
    "tp 2": ({"tp_size": 2}, ALL),
    "tp 4, more than key-value heads": ({"tp_size": 4}, HALF),
    "pp 2": ({"pp_size": 2}, ALL),
    "pp 4": ({"pp_size": 4}, HALF),
    "tp 2 x pp 2": ({"tp_size": 2, "pp_size": 2}, HALF),
    "interleaved pp 2 x 2": (INTERLEAVED, ALL),
    "tp 2 x interleaved pp 2 x 2": ({"tp_size": 2, **INTERLEAVED}, [("qwen2", True)]),
}


@pytest.mark.parametrize("topology", GREEDY)
def test_greedy_with_a_cache(pool: WorkerPool, topology: str) -> None:
    sizes, rows = GREEDY[topology]
    directories = [checkpoint(family, layers_for(sizes), tied) for family, tied in rows]
    ranks = pool.run(world_size(sizes), on_ranks, generate_and_look, sizes, directories)
    for row, directory, results in zip(rows, directories, zip(*ranks, strict=True), strict=True):
        for result in results:
            assert result["tokens"] == greedy(directory), row
            check_cache(result, head_dim=8)
        held = sorted({index for result in results for index in result["local"]})
        assert held == list(range(layers_for(sizes))), row


def test_the_reference_depends_on_padding_and_window() -> None:
    """What the comparisons above would not notice if these did not matter."""
    mistral = checkpoint("mistral")
    assert stock(mistral, attention_mask=torch.ones_like(PROMPTS)).tolist() != greedy(mistral)
    model = AutoModelForCausalLM.from_pretrained(mistral, sliding_window=None).eval()
    assert model.generate(**INPUTS, max_new_tokens=NEW, do_sample=False).tolist() != greedy(mistral)


@pytest.mark.parametrize("sizes", SPREAD, ids=str)
def test_options_of_generate(pool: WorkerPool, sizes: Sizes) -> None:
    """Stopping, beams, several sequences, a cache of the caller's, and none."""
    directory = checkpoint(layers=layers_for(sizes))
    first = greedy(directory)
    stop = first[0][PROMPTS.shape[1] + 2]
    cases: list[dict[str, Any]] = [
        {"max_new_tokens": 1},
        {"eos_token_id": stop},
        {"eos_token_id": [row[PROMPTS.shape[1] + 1 + index] for index, row in enumerate(first)]},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": stop},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
    ]
    expected = [stock(directory, **case).tolist() for case in cases]
    assert [row[-1] for row in expected[1]].count(0) >= 1, "no row stopped before the others"
    assert len(expected[2][0]) < PROMPTS.shape[1] + NEW, "the rows did not all stop early"
    for rank in run(pool, several, sizes, directory, cases):
        assert rank == expected


def several(model: Model, cases: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [generate(model, **case).tolist() for case in cases]


@pytest.mark.parametrize("sizes", SPREAD, ids=str)
def test_forwards_continue_a_cache(pool: WorkerPool, sizes: Sizes) -> None:
    """`model(...)` called by hand, without position ids: the cache that one forward returns serves the next."""
    directory = checkpoint("smollm3", layers=layers_for(sizes))
    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = whole(PROMPTS[:1]).logits
    for logits, lengths in run(pool, forwards, sizes, directory):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert lengths == [8] * layers_for(sizes)


def forwards(model: Model) -> tuple[torch.Tensor, list[int]]:
    from transformers import DynamicCache

    model.eval()
    with torch.no_grad():
        first = model(PROMPTS[:1, :5])
        second = model(PROMPTS[:1, 5:6], **{OUTPUT_NAME: cache_in(first)})
        own = DynamicCache()  # of the caller's, which grows layer by layer
        model(PROMPTS[:1, :6], past_key_values=own)  # a name that 5.24 still takes
        third = model(PROMPTS[:1, 6:], **{OUTPUT_NAME: own})
    return torch.cat((first.logits, second.logits, third.logits), 1), [layer.get_seq_length() for layer in own.layers]


RECURRENT = ("mamba", "qwen3_next", "bamba")


@pytest.mark.parametrize("sizes", [{"pp_size": 2}, INTERLEAVED], ids=["pp2", "interleaved"])
def test_layers_with_a_state_instead_of_keys(pool: WorkerPool, sizes: Sizes) -> None:
    """State-space models and hybrids: layers of a cache without a length stay on the rank that holds the layer."""
    inputs = {"input_ids": PROMPTS[:1]}
    expected = [tiny_model(family).eval().generate(**inputs, **LENGTH).tolist() for family in RECURRENT]
    assert pool.run(2, generate_families, sizes, RECURRENT, inputs) == [expected] * 2


@pytest.mark.parametrize("sizes", [{"pp_size": 2}, INTERLEAVED], ids=["pp2", "interleaved"])
def test_names_of_the_cache_in_layers(pool: WorkerPool, sizes: Sizes) -> None:
    """Of these families the layers are handed it as `layer_past`, or by place: absent ones keep its length as well."""
    wide = {"initializer_range": 0.3, "num_hidden_layers": 4}
    stock = [tiny_model(family, **wide).eval() for family in ("gpt_neox", "gpt2")]
    expected = [model.generate(**INPUTS, **LENGTH).tolist() for model in stock]
    assert pool.run(2, generate_families, sizes, ("gpt_neox", "gpt2"), INPUTS, wide) == [expected] * 2


LENGTH = {"max_new_tokens": NEW, "do_sample": False}


def generate_families(
    sizes: Sizes, families: tuple[str, ...], inputs: dict[str, Any], overrides: dict[str, Any] | None = None
) -> list[Any]:
    from hf_nanotron import ParallelConfig
    from hf_nanotron.models.sharding.parallelize import parallelize
    from hf_nanotron.parallel.mesh import ParallelMesh

    mesh = ParallelMesh(ParallelConfig(**sizes))
    try:
        models = [parallelize(tiny_model(family, **(overrides or {})), mesh) for family in families]
        return [model.generate(**inputs, **LENGTH).tolist() for model in models]
    finally:
        mesh.close()


def test_static_cache(pool: WorkerPool) -> None:
    directory = checkpoint()
    expected = stock(directory, cache_implementation="static").tolist()
    assert run(pool, several, {"pp_size": 2}, directory, [{"cache_implementation": "static"}]) == [[expected]] * 2


def test_embeddings_in_the_place_of_ids(pool: WorkerPool) -> None:
    directory = checkpoint(layers=4)
    embeddings = {"input_ids": None, "inputs_embeds": torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))}
    expected = stock(directory, **embeddings).tolist()
    assert run(pool, several, INTERLEAVED, directory, [embeddings]) == [[expected]] * 2


# ---- what cannot be had ----


def test_refusals(pool: WorkerPool) -> None:
    refused = run(pool, refusals, INTERLEAVED, checkpoint(layers=4))
    assert refused[0] == refused[1]
    hidden, static = refused[0]
    assert "output_hidden_states=True" in hidden and "pp_size=1" in hidden
    assert "static" in static and "dynamic" in static


def refusals(model: Model) -> list[str]:
    messages = []
    cases: list[dict[str, Any]] = [
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
    ]
    for case in cases:
        with pytest.raises(ValueError) as error:
            generate(model, **case)
        messages.append(str(error.value))
    return messages


# ---- sampling ----


@pytest.mark.parametrize("sizes", SPREAD, ids=str)
def test_sampling(pool: WorkerPool, sizes: Sizes) -> None:
    """The tokens that one process samples after the same seed, and generators that stand where its own stands."""
    directory = checkpoint(layers=layers_for(sizes))
    options = {"do_sample": True, "temperature": 3.0, "top_p": 0.95}
    set_seed(11)
    expected = [stock(directory, **options).tolist() for _ in range(2)]
    after = torch.get_rng_state()
    assert expected[0] != expected[1] and expected[0] != greedy(directory)
    for sampled, state, greedy_moves_generator in run(pool, sample_twice, sizes, directory, options):
        assert sampled == expected
        assert torch.equal(state, after)
        assert not greedy_moves_generator


def sample_twice(model: Model, options: dict[str, Any]) -> Any:
    # Only the first rank's seed counts.
    set_seed(11 + model.mesh.rank)
    sampled = [generate(model, **options).tolist() for _ in range(2)]
    state = torch.get_rng_state()
    generate(model)
    return sampled, state, not torch.equal(state, torch.get_rng_state())


# ---- bf16 ----


def test_bf16(pool: WorkerPool) -> None:
    """A pipeline rounds as one process does. Tensor parallelism sums in another order: near-best tokens."""
    directory = checkpoint("mistral")
    expected = (stock(directory, dtype=torch.bfloat16).tolist(), "torch.bfloat16")
    assert run(pool, generate_bf16, {"pp_size": 2}, directory) == [expected] * 2

    ranks = run(pool, generate_bf16, {"tp_size": 2}, directory)
    assert ranks[0] == ranks[1]
    tokens = torch.tensor(ranks[0][0])
    mask = torch.cat((INPUTS["attention_mask"], torch.ones(3, NEW, dtype=torch.long)), 1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logits = logits[:, -NEW - 1 : -1]
    chosen = logits.gather(-1, tokens[:, -NEW:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()


def generate_bf16(model: Model) -> tuple[list[list[int]], str]:
    output = generate(model.to(torch.bfloat16), return_dict_in_generate=True)
    return output.sequences.tolist(), str(cache_in(output).layers[0].keys.dtype)


# ---- around generate ----


def test_replicas_generate_by_themselves(pool: WorkerPool) -> None:
    """Two data-parallel replicas generate from different prompts, for a different number of steps."""
    directory = checkpoint()
    expected = [
        stock(directory, input_ids=PROMPTS[:1], attention_mask=None, max_new_tokens=3).tolist(),
        stock(directory, input_ids=PROMPTS[:1, :5], attention_mask=None, max_new_tokens=5).tolist(),
    ]
    ranks = pool.run(4, on_ranks, generate_by_replica, {"tp_size": 2}, [directory])
    assert [rank[0] for rank in ranks] == [expected[0], expected[0], expected[1], expected[1]]


def generate_by_replica(model: Model) -> list[list[int]]:
    prompt, new = (PROMPTS[:1], 3) if model.mesh.dp_rank == 0 else (PROMPTS[:1, :5], 5)
    return generate(model, input_ids=prompt, attention_mask=None, max_new_tokens=new).tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """Token 7 is the word "w7"."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left")


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_pipelines_and_streamers(pool: WorkerPool, sizes: Sizes) -> None:
    """`transformers.pipeline` around the parallel model, and a streamer that the first rank alone has."""
    directory = checkpoint()
    texts = ["w5 w6 w7 w8", "w20 w21"]
    whole = AutoModelForCausalLM.from_pretrained(directory)
    words = tokenizer()
    expected = pipeline("text-generation", model=whole, tokenizer=words)(
        texts, batch_size=2, max_new_tokens=NEW, do_sample=False
    )
    streamed = words.decode(stock(directory, input_ids=PROMPTS[:1], attention_mask=None)[0, PROMPTS.shape[1] :])
    for rank, (generated, stream) in enumerate(run(pool, pipe_and_stream, sizes, directory, texts)):
        assert generated == expected
        assert stream == (streamed if rank == 0 else None)


def pipe_and_stream(model: Model, texts: list[str]) -> Any:
    words = tokenizer()
    generated = pipeline("text-generation", model=model, tokenizer=words)(
        texts, batch_size=2, max_new_tokens=NEW, do_sample=False
    )
    streamer = TextIteratorStreamer(words, skip_prompt=True) if model.mesh.rank == 0 else None
    generate(model, input_ids=PROMPTS[:1], attention_mask=None, streamer=streamer)
    return generated, "".join(streamer) if streamer else None


class Generate(TrainerCallback):
    """Greedy and sampled text after every step."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        assert model.training
        self.tokens.append((generate(model).tolist(), generate(model, do_sample=True).tolist()))
        assert model.training


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "pp_size": 2}, INTERLEAVED], ids=str)
def test_generation_leaves_training_as_it_is(pool: WorkerPool, sizes: Sizes) -> None:
    """With dropout, which would draw other masks from a disturbed generator."""
    directory = checkpoint_with_dropout(layers_for(sizes))
    plain = pool.run(world_size(sizes), losses, directory, sizes)
    talking = pool.run(world_size(sizes), losses_while_generating, directory, sizes)
    assert talking[0][0] == plain[0] and len(plain[0][0]) == 3
    tokens = talking[0][1]
    assert all(rank[1] == tokens for rank in talking)
    assert len(tokens) == 3 and tokens[0][0] != tokens[2][0], "training did not change what is generated"


@functools.cache
def checkpoint_with_dropout(layers: int) -> str:
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    config = tiny_config(num_hidden_layers=layers, initializer_range=0.3, attention_dropout=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


STEPS = {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 5e-2}


def losses(directory: str, sizes: Sizes) -> tuple[list[float], list[float]]:
    history = train_parallel(directory, random_dataset(8), **STEPS, **sizes)
    return history.losses, history.norms


def losses_while_generating(directory: str, sizes: Sizes) -> Any:
    from hf_nanotron import AutoModelForCausalLM as ParallelAuto, NanotronTrainer, NanotronTrainingArguments

    args = NanotronTrainingArguments(**training_arguments(**STEPS, **sizes))
    history, talk = History(), Generate()
    NanotronTrainer(
        model=ParallelAuto.from_pretrained(directory, parallel=args.parallel),
        args=args,
        train_dataset=random_dataset(8),
        data_collator=pad_batch,
        callbacks=[history, talk],
    ).train()
    return (history.losses, history.norms), talk.tokens
