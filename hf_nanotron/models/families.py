"""What the declared plans of transformers leave unsaid, one table per concern."""

from __future__ import annotations

# Linears inside an attention module whose cut must fall between heads, and the config attribute that counts the heads.
HEADS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "o_proj": "num_attention_heads",
}

# Attributes of an attention module that its forward reads and that change with the cut: the number of query heads that
# share one key-value head *on this rank*.
QUERY_GROUPS = "num_key_value_groups"
