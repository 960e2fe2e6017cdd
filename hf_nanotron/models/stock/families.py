"""What the declared plans of transformers leave unsaid or get wrong, one table per concern.

Blocks are the modules that a decoder layer consists of; they are named by their class, because some families call
different blocks (attention and Mamba, say) by the same name. `docs/families.md` lists what each family does with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .releases import FORMER_TUPLES

T = TypeVar("T")
Rows = Mapping[str, str | None]

# ---- names ----

LAYERS = ("layers", "h", "blocks")  # stacks of decoder layers inside a backbone
# Parts of a backbone outside its layers are used after them, but for the embedding and these.
FIRST_STAGE = (
    "embed_tokens_extend",
    "altup_projections",
    "wpe",
    "word_embeddings_layernorm",
    "embed_positions",
    "input_hidden_states_scale",
    "input_hidden_states_bias",
    "positions_embed",
)
# What computes an input of its own for every layer from token ids and their embeddings: each stage computes all of it.
EVERY_STAGE = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")

# ---- which weights are cut ----

# What a declared style means here; None: the module stays whole. Gathered outputs and split inputs inside a layer mean
# that what lies between them is whole on every rank, so both ends stay whole too.
STYLES: dict[str, str | None] = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "packed_colwise": "packed_colwise",
    "packed_rowwise": "packed_rowwise",
    "colwise_gather_output": None,
    "rowwise_split_input": None,
    "replicated_with_grad_allreduce": None,
    "mla_kv_a_proj": None,
    "local_params": None,
    "moe_tp_experts": None,
    "moe_identity_expert": "identity",
    "embedding_rowwise": None,
    "embedding_colwise": None,
    "all_reduce": None,
    "replicate": None,
}

COLUMN, ROW, PACKED = "colwise", "rowwise", "packed_colwise"
ATTENTION: Rows = {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW}
LATENT_ATTENTION: Rows = {"q_proj": COLUMN, "q_b_proj": COLUMN, "kv_b_proj": COLUMN, "o_proj": ROW}
# Norms over the features of all heads: cut with the heads, the mean square summed over the ranks.
NORMED_ATTENTION: Rows = {**ATTENTION, "q_norm": "norm", "k_norm": "norm"}
MLP: Rows = {"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW}
FUSED_MLP: Rows = {"gate_up_proj": PACKED, "down_proj": ROW}
FUSED_QKV: Rows = {"qkv_proj": "qkv", "o_proj": ROW}
BIASED_MLP: Rows = {"dense_h_to_4h": COLUMN, "dense_4h_to_h": ROW}
OUT_ATTENTION: Rows = {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "out_proj": ROW}
LFM_MLP: Rows = {"w1": COLUMN, "w3": COLUMN, "w2": ROW}
WHOLE: Rows = {"": None}


def inside(name: str, rows: Rows) -> Rows:
    """`rows` of a module that a block holds under `name`."""
    return {f"{name}.{path}": style for path, style in rows.items()}


# Class of a block -> rows that are added to the declared ones (None takes one away, "" all of them).
SHARDING: dict[str, Rows] = {
    "AfmoeAttention": {**ATTENTION, "gate_proj": COLUMN},
    "AfmoeMLP": MLP,
    "AfmoeSparseMoeBlock": inside("shared_experts", MLP),
    "AXK1Attention": LATENT_ATTENTION,
    "BailingHybridAttention": {**LATENT_ATTENTION, "g_proj": COLUMN},
    "Cohere2MoeSparseMoeBlock": inside("shared_experts", MLP),
    "CohereAttention": {"q_norm": "heads", "k_norm": "heads"},
    "DeepseekV3Attention": LATENT_ATTENTION,
    "DeepseekV4SparseMoeBlock": inside("shared_experts", MLP),
    "DoryAttention": {**ATTENTION, "gate_proj": COLUMN, "sqk": COLUMN, "s_gate": COLUMN, "attn_sub_norm": "unit_norm"},
    "DoryMLP": {**MLP, "suv_gate": COLUMN, "suv_up": COLUMN, "ffn_sub_norm": "unit_norm"},
    "DogeAttention": WHOLE,  # a mask over all heads is made inside
    "ExaoneMoeSparseMoEBlock": inside("shared_experts", MLP),
    "FlexOlmoAttention": NORMED_ATTENTION,
    "FlintAttention": {**ATTENTION, "sinks": COLUMN},
    "Gemma3nTextMLP": WHOLE,  # a mean and a deviation over the gate's whole width
    "Glm4MLP": FUSED_MLP,
    "Glm4MoeLiteMoE": inside("shared_experts", MLP),
    "GlmMLP": FUSED_MLP,
    "GptOssAttention": {**ATTENTION, "sinks": COLUMN},
    "GptOssMLP": {
        "experts.gate_up_proj": ROW,  # [experts, in, out], gates and ups alternate
        "experts.gate_up_proj_bias": ROW,
        "experts.down_proj": COLUMN,
    },
    "GraniteMoeAttention": ATTENTION,
    "GraniteMoeHybridAttention": ATTENTION,
    "GraniteMoeHybridMLP": {"input_linear": PACKED, "output_linear": ROW},
    "GraniteMoeSWAMLP": {"input_linear": PACKED, "output_linear": ROW},
    "GraniteMoeSharedAttention": ATTENTION,
    "GraniteMoeSharedMLP": {"input_linear": PACKED, "output_linear": ROW},
    "HunYuanMoEV1Attention": ATTENTION,
    "HunYuanMoEV1Moe": inside("shared_mlp", MLP),
    "InklingMoE": {"experts.gate_up_proj": PACKED},
    "Inkling2LoopSparseMoeBlock": {"experts.gate_up_proj": PACKED},
    "Inkling2SparseMoeBlock": {"experts.gate_up_proj": PACKED},
    "JambaAttention": ATTENTION,
    "JambaMLP": MLP,
    "KimiLinearAttention": LATENT_ATTENTION,
    "Lfm2MoeAttention": OUT_ATTENTION,
    "Lfm2MoeMLP": LFM_MLP,
    "MiniMaxM2Attention": NORMED_ATTENTION,
    "MiniMaxM3VLAttention": ATTENTION,
    "MiniMaxM3VLDenseMLP": FUSED_MLP,
    "MiniMaxM3VLSparseMoeBlock": inside("shared_experts", FUSED_MLP),
    "NemotronHAttention": ATTENTION,
    "NemotronHMLP": {"up_proj": COLUMN, "down_proj": ROW},
    "NemotronHMoE": inside("shared_experts", {"up_proj": COLUMN, "down_proj": ROW}),
    "Olmo2Attention": NORMED_ATTENTION,
    "Olmo3Attention": NORMED_ATTENTION,
    "OlmoHybridAttention": NORMED_ATTENTION,
    "OlmoeAttention": NORMED_ATTENTION,
    "Phi3Attention": FUSED_QKV,
    "Phi3MLP": FUSED_MLP,
    "Phi4MultimodalAttention": FUSED_QKV,
    "Phi4MultimodalMLP": FUSED_MLP,
    "PhimoeAttention": ATTENTION,
    "Qwen2MoeSparseMoeBlock": inside("shared_expert", MLP),
    "SolarOpenMoE": inside("shared_experts", MLP),
    "YoutuAttention": LATENT_ATTENTION,
    "ZayaSparseMoeBlock": {"experts.gate_up_proj": PACKED, "experts.down_proj": ROW},
}

# The same for families that declare no plan at all.
UNDECLARED: dict[str, Rows] = {
    "BambaAttention": ATTENTION,
    "BambaMLP": MLP,
    "BioGptAttention": OUT_ATTENTION,  # the two layers of its MLP are no block
    "BitNetAttention": {**ATTENTION, "attn_sub_norm": "norm"},
    "BitNetMLP": {**MLP, "ffn_sub_norm": "norm"},
    "DiffLlamaAttention": WHOLE,  # the first and the second half of the heads are subtracted
    "DiffLlamaMLP": MLP,
    "Emu3Attention": ATTENTION,
    "Emu3MLP": MLP,
    "FalconH1Attention": ATTENTION,
    "FalconH1MLP": MLP,
    "FalconMambaMixer": WHOLE,
    "GPTJAttention": OUT_ATTENTION,
    "GPTJMLP": {"fc_in": COLUMN, "fc_out": ROW},
    "HunYuanDenseV1Attention": ATTENTION,
    "HunYuanDenseV1MLP": MLP,
    "Lfm2Attention": OUT_ATTENTION,
    "Lfm2MLP": LFM_MLP,
    "Lfm3Attention": {**ATTENTION, "g_proj": COLUMN},
    "Lfm3MLP": LFM_MLP,
    "Mamba2Mixer": WHOLE,
    "MambaMixer": WHOLE,
    "OPTAttention": OUT_ATTENTION,
    "PersimmonAttention": {"query_key_value": COLUMN, "dense": ROW},
    "PersimmonMLP": BIASED_MLP,
    "StableLmAttention": ATTENTION,
    "StableLmMLP": MLP,
    "XGLMAttention": WHOLE,  # its output takes the width of the whole model
}
SHARDING.update(UNDECLARED)

# Class of a block -> the module that leaves a block whole which holds it.
WHOLE_WITH: dict[str, str] = {"MiniMaxM3VLAttention": "indexer"}  # it makes a mask for all key-value heads

# Linears of an attention block that are cut between heads: of queries, or of keys and values.
QUERY_HEADS = (
    *("q_proj", "q_b_proj", "q_gate_proj", "kv_b_proj", "query_key_value", "q_norm"),
    *("g_proj", "gate_proj", "gate_bias", "sinks", "sqk", "s_gate"),
    *("o_proj", "out_proj", "dense"),
)
KEY_HEADS = ("k_proj", "v_proj", "k_norm")

# Class of an attention block whose fused projection comes in parts, each with queries, keys and values of its own ->
# the attribute that says how many. They are what is cut.
FUSED_PARTS: dict[str, str] = {"CodeGenAttention": "mp_num"}

# Attributes of an attention block that its forward reads and that change with the cut.
LOCAL_QUERY_HEADS = ("num_heads", "num_attention_heads")
LOCAL_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
QUERY_GROUPS = "num_key_value_groups"

# Model types whose head is not cut: something between it and the loss needs whole logits.
WHOLE_HEAD: dict[str, str] = {
    "dory": "the logits of each token have their own scale",
    "inkling2_loop_text": "the logits are trimmed to an unpadded vocabulary",
    "inkling_text": "the logits are trimmed to an unpadded vocabulary",
    "inkling2_text": "the logits are trimmed to an unpadded vocabulary",
}

# Classes of blocks that multiply states by buffers (decay rates), which stay in fp32 in a model of 16 bits: they run
# under autocast, as all of a stock model does in `bf16=True`.
MIXES_DTYPES = ("MiniMaxLightningAttention",)

# ---- sequence parallelism ----

# Blocks without cut weights that mix tokens, by a part of their class's name: tokens are gathered in front of them, and
# each rank computes all. Every other block without cut weights works on each token alone.
MIXES_TOKENS = ("Attention", "Mamba", "Mixer", "DeltaNet", "ShortConv", "PLELayer")

# Those of them whose state goes on from one packed document to the next, as a recurrence's or a convolution's does.
CARRIES_STATE = (
    *("Mamba", "Mixer", "DeltaNet", "DeltaAttention", "LightningAttention", "ShortConv"),
    *("InklingAttention", "Inkling2FullAttention", "Inkling2SlidingAttention", "ZayaAttention"),
    *("Inkling2LoopFullAttention", "Inkling2LoopSlidingAttention", "Qwen4ExpTextAttention"),
)

# Dimension of the hidden states between layers that is the sequence, where it is not 1.
SEQUENCE_DIM: dict[str, int] = {"gemma3n_text": 2}

# Class of a decoder layer -> the arguments besides the hidden states that hold something for each token, by position.
TOKEN_ARGUMENTS: dict[str, tuple[int, ...]] = {"Gemma3nTextDecoderLayer": (2,), "Gemma4TextDecoderLayer": (1,)}

# Class of a block -> the module inside it in front of which its partial outputs are summed, instead of at its end.
SUMS_BEFORE: dict[str, str] = {"AXK1MoE": "post_mlp_layernorm"}

# ---- pipeline ----

# Class of a decoder layer that returns a tuple -> the name of the argument that takes its second part in the next layer
# (the first one after the hidden states, where it is given by position).
CARRIES: dict[str, str] = {
    "GlmMoeDsaDecoderLayer": "prev_topk_indices",
    "HYV4DecoderLayer": "prev_topk_indices",
    "ZayaDecoderLayer": "prev_router_hidden_states",
}

# Classes of decoder layers that return a tuple whose second part nobody takes.
RETURNS_TUPLE = (
    *("BambaDecoderLayer", "BloomBlock", "FalconDecoderLayer", "FalconH1DecoderLayer", "GPTJBlock", "GPTNeoBlock"),
    *("MptBlock", *FORMER_TUPLES),
)

# ---- recomputation ----

# Classes of modules that write to a weight of their own while they train (Gemma 3n clips coefficients). Compiled inside
# of what is recomputed, such a write counts as a change of what the backward needs.
WRITES_WEIGHTS = ("Gemma3nTextAltUp",)

# ---- what cannot work ----

NO_PIPELINE: dict[str, str] = {
    "dory": "its middle layers run in loops, so it cannot be split into stages",
    "hrm_text": "two stacks of layers run in cycles, so it cannot be split into stages",
    "inkling2_loop_text": "its layers run in loops and attend to the states of all earlier blocks of layers",
    "inkling2_text": "its layers attend to the embedding and to the states of all earlier blocks of layers",
}
NO_SEQUENCE_PARALLEL: dict[str, str] = {
    "dory": "its middle layers run in loops, each of which starts from the input of the first",
    "gptj": "its backbone views the last hidden states in the shape of the input",
    "hrm_text": "two stacks of layers run in cycles around the token embedding",
    "inkling2_loop_text": "its layers run in loops and attend to the states of all earlier blocks of layers",
    "inkling2_text": "its layers attend to the embedding and to the states of all earlier blocks of layers",
    "zaya": "its layers pass on a second state of every token",
}

# ---- attention ----

# Model types whose layers say all about their attention in keyword arguments, as transformers' flash attention wants
# it: compared with eager attention by `tests/test_attention.py --full-matrix`, with windows, padding and documents.
# Not "qwen2_moe" and "phimoe", whose masks have a window that the keyword arguments lack.
FAST_ATTENTION = (
    *("afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "beam", "bitnet", "cohere", "cohere2"),
    *("cohere2_moe", "cohere_compass_text", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dory", "dots1"),
    *("emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "gemma"),
    *("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoehybrid"),
    *("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3"),
    *("iquestcoder", "jais2", "kolibri1", "laguna", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "llama"),
    *("longcat_flash", "mellum", "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mistral"),
    *("mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3"),
    *("phi4_multimodal", "qwen2", "qwen3", "qwen3_moe", "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3"),
    *("solar_open", "starcoder2", "youtu", "zaya"),
)

# Those of them whose own masks do not know packed documents, or that do not hand keyword arguments on.
NO_DOCUMENTS = ("afmoe", "granitemoehybrid", "nemotron", "opt")

# Types of text models whose own attention sees other packed documents of a row wherever `position_ids` begin anew:
# their masks are made without them, or it sees blocks of a row's tokens.
SEES_DOCUMENTS = ("afmoe", "biogpt", "bloom", "deepseek_v4", "gpt_oss", "minimax_m3_vl_text", "mpt", "opt", "xglm")


# Further types whose rows context-parallel ranks can share: their attention has a causal mask and nothing else. Blocks
# that mix tokens otherwise see whole rows.
CONTEXT_PARALLEL = (
    *("bailing_hybrid", "bamba", "codegen", "falcon_h1", "gptj", "hrm_text", "kimi_linear", "nemotron_h"),
    *("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
)

# Those of all whose rows cannot be shared by context-parallel ranks, and why.
NO_CONTEXT_PARALLEL: dict[str, str] = {
    "zaya": "convolutions in its attention mix neighbouring tokens",
}


def row_of(table: Mapping[str, T], module: object) -> T | None:
    """The row of a table for the class of `module`, or for the nearest ancestor of it that has one."""
    return next((table[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in table), None)


def register_plan(block_class: str, rows: Rows) -> None:
    """Say how the weights of a block are cut, for a family that transformers declares no plan for, or a wrong one.

    Args:
        block_class: name of the class of a decoder layer's attention, MLP or mixture-of-experts module.
        rows: path of a linear layer (or bare parameter) inside the block -> `"colwise"` (output features are cut),
            `"rowwise"` (input features are cut, outputs summed), `"packed_colwise"` (two layers stored one after the
            other in one weight), or None to leave what the declared plan cuts whole. `{"": None}` leaves all of it
            whole.

    Raises:
        ValueError: for a style that is not one of these.
    """
    known = {style for style in STYLES.values() if style} | {"norm", "unit_norm", "heads", "qkv"}
    for path, style in rows.items():
        if style is not None and style not in known:
            raise ValueError(f"{block_class}.{path}: {style!r} is not one of {', '.join(sorted(known))}, or None.")
    SHARDING[block_class] = {**SHARDING.get(block_class, {}), **rows}
