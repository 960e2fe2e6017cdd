"""What each public method of transformers' and torch's models is on a sharded model, beside those that are refused."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

# Replaced: what they say or do is right for the whole model, or for this rank's part where that is documented.
OURS = (
    "__deepcopy__",
    "_apply",
    "dtype",
    "forward",
    "generate",
    "get_memory_footprint",
    "get_parameter",
    "load_state_dict",
    "loss_function",
    "named_parameters",
    "num_parameters",
    "resize_token_embeddings",
    "save_pretrained",
    "set_attn_implementation",
    "set_input_embeddings",
    "set_output_embeddings",
    "state_dict",
    "tie_weights",
)

# As in transformers and torch, where each of them is right for a cut model too. What they write into weights, or
# replace, the trainer sees (`parallel/zero/written.py`, `cut.py`).
FINE: dict[str, tuple[str, ...]] = {
    "go through `_apply`": ("bfloat16", "cpu", "cuda", "double", "float", "half", "ipu", "mtia", "share_memory", "to",
                            "to_empty", "type", "xpu"),
    "write into weights, or change modules, which the trainer sees": (
        "add_module", "apply", "register_buffer", "register_module", "register_parameter", "requires_grad_",
        "zero_grad"),
    "read modules and this rank's tensors": (
        "base_model", "buffers", "children", "device", "get_buffer", "get_decoder", "get_encoder", "get_extra_state",
        "get_input_embeddings", "get_output_embeddings", "get_parameter_or_buffer", "get_position_embeddings",
        "get_submodule", "modules", "named_buffers", "named_children", "named_modules", "named_non_persistent_buffers",
        "parameters", "retrieve_modules_from_names"),
    "switch something that is not a weight": (
        "activation_checkpointing_disable", "activation_checkpointing_enable", "add_model_tags",
        "disable_input_require_grads", "enable_input_require_grads", "eval", "gradient_checkpointing_disable",
        "gradient_checkpointing_enable", "register_for_auto_class", "set_experts_implementation", "set_extra_state",
        "train"),
    "register hooks; those of gradients are refused where they would not be called": (
        "register_backward_hook", "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook", "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook",
        "register_state_dict_post_hook", "register_state_dict_pre_hook"),
    "say something about the class or the config": (
        "can_generate", "can_record_outputs", "dummy_inputs", "ep_plan", "extra_repr", "fsdp_plan", "fsdp_size",
        "generation_config_class", "get_correct_attn_implementation", "get_correct_experts_implementation",
        "get_expanded_tied_weights_keys", "get_experts_implementation", "is_activation_checkpointing",
        "is_backend_compatible", "is_custom_code", "is_distributed_loading_by_transformers",
        "is_gradient_checkpointing", "is_remote_code", "mark_tied_weights_as_initialized", "pp_plan",
        "should_save_on_this_rank", "supports_context_parallel", "supports_pp_plan", "supports_tp_plan", "tp_plan",
        "tp_size", "use_kernels", "warn_if_padding_and_no_attention_mask"),
    "make or load another model": (
        "from_pretrained", "get_init_context", "init_parallel_plans", "maybe_distribute_model",
        "prepare_distribute_model"),
    "need adapters, which a cut model has none of": (
        "active_adapters", "delete_adapter", "disable_adapters", "enable_adapters", "get_adapter_state_dict",
        "set_adapter"),
    "compile the forward, which the trainer does by its arguments": ("compile", "get_compiled_call"),
    "wait for other ranks": ("barrier_after_gathered_checkpoint_save",),
}  # fmt: skip


@functools.cache
def methods_of(stock: type[PreTrainedModel] = PreTrainedModel) -> frozenset[str]:
    """Names of all public methods and properties of a model class, and of what it is built on.

    What was put on these classes while the process ran is left out; transformers itself does so with `smart_apply`,
    which makes fresh weights.
    """
    return frozenset(
        name
        for base in stock.__mro__[:-1]
        for name, value in vars(base).items()
        if not name.startswith("_") and name != "smart_apply"
        if _module_of(value).startswith(("torch.nn.", "transformers."))
    )


def _module_of(value: Any) -> str:
    """Where a method or property was written; empty for anything else."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return str(getattr(function, "__module__", "")) if callable(function) and not isinstance(function, type) else ""
