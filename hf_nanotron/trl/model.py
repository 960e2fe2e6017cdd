"""The model and the tokenizer of a fine-tuning run, as `trl.SFTTrainer` takes them."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import clone_chat_template
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..arguments.rules import as_mapping
from ..models.auto import AutoModelForCausalLM
from ..models.base import ParallelModel
from .config import NanotronSFTConfig

logger = logging.get_logger(__name__)

JINJA = (".jinja", ".j2")


def take_up(
    model: Any, processing_class: Any, args: NanotronSFTConfig, has_adapters: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, sharded or to be sharded, and its tokenizer, with the chat template of `args.chat_template_path`.

    A string is loaded as in TRL, in fp32 unless `model_init_kwargs` says something else, by the parts of this rank.
    `has_adapters` says whether adapters alone are to be trained.

    Raises:
        ValueError: for a processor of images, a template that needs a larger vocabulary than a sharded model has, or
            one whose new tokens nothing would train.
    """
    clones = args.chat_template_path is not None and not is_jinja(args.chat_template_path)
    if clones and str(args.chat_template_path).endswith(JINJA):
        raise ValueError(f"chat_template_path={args.chat_template_path!r} is no file.")
    given = as_mapping(args.model_init_kwargs)
    revision = given.get("revision") if isinstance(model, str) else None
    if isinstance(model, str):
        given.setdefault("dtype", "float32")
        if clones:
            logger.warning_once(
                f"chat_template_path={args.chat_template_path!r} may resize the embeddings, so every rank loads the "
                f"whole of {model} before it is sharded; use a Jinja file to load the part of each rank alone."
            )
            model = create_model_from_path(model, **{**given, "device_map": None})
        else:
            given.pop("trust_remote_code", None)
            model = AutoModelForCausalLM.from_pretrained(model, parallel=args.parallel, **given)
    elif not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model={type(model).__name__} is neither a Hub id, nor a causal LM of transformers: an adapter has to be "
            "merged first (model = model.merge_and_unload(), then model.requires_grad_(True))."
        )
    tokenizer = _tokenizer(model, processing_class, revision, args)
    if clones:
        if isinstance(model, ParallelModel) and not _fits(model, tokenizer, str(args.chat_template_path)):
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r}: its tokenizer changes the size of the vocabulary, "
                "and the model is sharded already; pass the model's id, or a stock model, whose embeddings are resized "
                "first."
            )
        model, tokenizer, added = clone_chat_template(model, tokenizer, str(args.chat_template_path))
        if added and has_adapters:
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} with peft_config: its tokenizer adds {len(added)} "
                "tokens, whose embeddings are of the frozen base and are not saved; use a Jinja file, or a base model "
                "that has these tokens."
            )
    return model, tokenizer


def is_jinja(path: str) -> bool:
    return os.path.isfile(path) and path.endswith(JINJA)


def _tokenizer(
    model: PreTrainedModel, given: Any, revision: str | None, args: NanotronSFTConfig
) -> PreTrainedTokenizerBase:
    if given is None:
        given = AutoProcessor.from_pretrained(get_config_model_id(model.config), revision=revision)
    if isinstance(given, ProcessorMixin):
        raise ValueError(
            f"processing_class={type(given).__name__} is of images or sound, which are not supported: causal LMs are "
            "trained on text; pass the tokenizer (AutoTokenizer.from_pretrained)."
        )
    if not isinstance(given, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class={type(given).__name__} is no tokenizer of transformers.")
    return given


def _fits(model: ParallelModel, tokenizer: PreTrainedTokenizerBase, path: str) -> bool:
    """Whether `clone_chat_template`, which rounds up to a multiple of 64, leaves the vocabulary as large as it is."""
    source = AutoTokenizer.from_pretrained(path)
    new = [token for token in source.added_tokens_decoder.values() if token.content not in tokenizer.get_vocab()]
    size = len(tokenizer.get_vocab()) + len(new)
    return -(-size // 64) * 64 == model.vocabulary.inputs
