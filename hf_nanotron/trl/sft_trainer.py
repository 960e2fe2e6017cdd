"""`NanotronSFTTrainer`: `trl.SFTTrainer` on any tp x cp x pp x dp.

TRL prepares the data, collates it and names the metrics; `NanotronTrainer` trains. Both override `Trainer`, and methods
of `NanotronTrainer` come first. This is the only file that overrides methods of TRL's trainer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..checkpoint.directory.save import Save
from ..checkpoint.files.repository import unlink_link
from ..checkpoint.hub.card import add_sizes
from ..checkpoint.state.training_state import saved_extra
from ..data.dealing import FillerBatch
from ..models.token_figures import TokenFigures
from ..parallel.collectives import all_reduce
from ..parallel.mesh import ParallelMesh
from ..parallel.together import together
from ..plan.result import Plan
from ..trainer import NanotronTrainer
from ..training.agreement.values import check_shared
from ..training.constructor import refuse_arguments
from .arguments import check_trainer_arguments
from .config import NanotronSFTConfig
from .data import check_eval_data, check_train_data
from .lora import (
    ADAPTERS,
    add_adapters,
    check_lora,
    compare_adapters,
    load_adapters,
    refuse_adapters_of,
    refuse_base,
    refuse_folder_of_adapters,
    save_adapters,
)
from .metrics import SFTMetrics
from .model import is_jinja, take_up

SEEN = "trl_num_tokens"  # its key in the `extra` of a training state


def of_probability(losses: torch.Tensor) -> torch.Tensor:
    """What dynamic fine-tuning multiplies the loss of each token by (Wu et al. 2025, arXiv:2508.05629, equation 9)."""
    return (-losses).exp()


class NanotronSFTTrainer(NanotronTrainer, SFTTrainer):
    """Fine-tunes a causal language model on any tp x cp x pp x dp, as `trl.SFTTrainer` does in one process.

    Takes the arguments of `trl.SFTTrainer`; `args` is a `NanotronSFTConfig`. A `model` that is a string is read by the
    parts of each rank.

    Raises:
        ValueError: for an argument that cannot be honoured, naming it and what to use instead.
    """

    args: NanotronSFTConfig
    libraries: ClassVar[tuple[str, ...]] = (*NanotronTrainer.libraries, "trl")

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: NanotronSFTConfig | None = None,
        *positional: Any,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, NanotronSFTConfig):
            raise ValueError(
                f"{type(self).__name__} needs `args` of type NanotronSFTConfig, which hold the parallel sizes and "
                f"TRL's options, not {type(args).__name__}."
            )
        args.check()
        lora = kwargs.pop("peft_config", None)
        check_trainer_arguments(kwargs, args)
        if lora is not None:
            check_lora(lora, args)
        else:
            refuse_folder_of_adapters(str(args.output_dir))
        refuse_arguments(positional, kwargs)
        check_train_data(kwargs.get("train_dataset"), args, kwargs.get("formatting_func") is not None)
        check_eval_data(kwargs.get("eval_dataset"))
        given = model
        model, tokenizer = take_up(model, processing_class, args, lora is not None)
        self.lora_config = None
        if lora is not None:
            self._mesh: ParallelMesh | None = None
            model = self._parallel_model(model, args)
            refuse_base(model, Path(str(args.output_dir)))
            self.lora_config = add_adapters(model, lora, args.seed)
        self._own_forward = vars(model).get("forward")
        self._figures: SFTMetrics | None = None
        template, options = args.chat_template_path, args.model_init_kwargs
        args.chat_template_path = _left_to_trl(template)
        if isinstance(given, str):  # TRL would warn that they are ignored
            args.model_init_kwargs = None
        try:
            super().__init__(model, args, *positional, processing_class=tokenizer, **kwargs)
        finally:
            args.chat_template_path, args.model_init_kwargs = template, options

    @property
    def trains_adapters(self) -> bool:
        return self.lora_config is not None

    def plan(self, gpu: str | None = None, gpus: int | None = None, **options: Any) -> Plan:
        """As `NanotronTrainer.plan`, for rows of `max_length` tokens unless `sequence_length` says otherwise.

        Raises:
            ValueError: and for adapters, since a plan counts the training of all weights.
        """
        if self.trains_adapters:
            raise ValueError(
                "plan with peft_config is not supported: it counts the gradients and moments of all weights. Plan the "
                "same run without peft_config, which takes more memory and time."
            )
        options.setdefault("sequence_length", self.args.max_length)
        return super().plan(gpu, gpus, **options)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TRL, of data that it prepares."""
        if not isinstance(eval_dataset, str):
            check_eval_data(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # ---- what TRL's constructor leaves on the model ----

    def _take_up_model(self) -> None:
        """Without TRL's head, which makes log-probabilities of whole weights: ours is sharded, and says the same."""
        model: Any = self.model
        model.__dict__.pop("forward", None)
        if self._own_forward is not None:
            model.forward = self._own_forward
        if hasattr(model, "router_aux_loss_coef"):
            model.router_aux_loss_coef = self.router_aux_loss_coef
        super()._take_up_model()
        if self.args.loss_type == "dft":
            self.model.training_loss.reweigh = of_probability
        if self._figures is None:
            self._figures = SFTMetrics(self.mesh.device)

    def _check_loss(self) -> None:
        super()._check_loss()
        if self.args.loss_type == "dft" and self.model.makes_logits:
            raise ValueError(
                "loss_type='dft' with a loss that is not the model's plain one: it multiplies the plain loss of each "
                "token; use loss_type='nll', or do without the model's own loss, hooks on its head and compute_loss."
            )

    # ---- a step ----

    def _new_figures(self, micro_batches: int) -> TokenFigures | None:
        return TokenFigures(micro_batches, self.mesh.device)

    def _note_figures(self, figures: TokenFigures, mode: str) -> None:
        assert self._figures is not None
        self._figures.note(figures, mode)

    def _share_of_routers(self, batches: list[dict[str, Any]]) -> float | torch.Tensor:
        """One over the micro-batches of the step: TRL takes a mean over them, where Trainer adds up."""
        real = sum(not isinstance(batch, FillerBatch) for batch in batches)
        return 1 / all_reduce(torch.tensor(float(real), device=self.mesh.device), self.mesh.dp)

    # ---- adapters ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Of a run with adapters they alone: the base is that of the model. Most are in the training state."""
        if self.lora_config is None:
            refuse = partial(refuse_adapters_of, resume_from_checkpoint)
            together(self.mesh, "looking for adapters", refuse)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif (index := self._checkpointer.index_of(resume_from_checkpoint)) is None:
            read = partial(load_adapters, self.model, Path(resume_from_checkpoint))
            together(self.mesh, "reading the adapters", read)
            self.weights.read_from_model()
        else:
            compare = partial(compare_adapters, self.model, resume_from_checkpoint, index)
            together(self.mesh, "comparing the adapters", compare)

    def _write_model(self, save: Save, with_weights: bool) -> None:
        if self.lora_config is None:
            super()._write_model(save, with_weights)
        elif with_weights:
            save.files += save_adapters(self.model, self.lora_config, save.directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model, or in a run with adapters these alone, in PEFT's format; all ranks together."""
        if self.lora_config is None:
            super()._save(output_dir, state_dict)
            return
        directory = Path(output_dir or str(self.args.output_dir))
        self._guard.refuse_to_save(f"the adapters in {directory}", self.state.global_step)
        check_shared(self.mesh, directory, "output_dir")
        save_adapters(self.model, self.lora_config, directory)
        self._write_companions(directory)

    # ---- log and save ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, with its metrics."""
        mode = "train" if self.model.training else "eval"
        if self._figures is not None:
            self._metrics[mode].update(self._figures.take(mode, self.aux_loss_enabled))
        super().log(logs, start_time)

    def extra_state(self) -> dict[str, Any]:
        """And the tokens that were trained on, and the adapters."""
        assert self._figures is not None
        own = {ADAPTERS: self.model.adapters} if self.trains_adapters else {}
        return {**super().extra_state(), SEEN: int(self._figures.tokens), **own}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._figures is not None:
            if (index := self._checkpointer.index_of(checkpoint)) is not None:
                self._figures.tokens.fill_(float(saved_extra(index).get(SEEN, 0)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in TRL, with a model card in `output_dir`."""
        args = self.args
        self.create_model_card(model_name=(args.hub_model_id or str(args.output_dir)).rstrip("/").split("/")[-1])
        super()._save_checkpoint(model, trial)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's, with the parallel sizes of this run; on rank 0."""
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            unlink_link(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            SFTTrainer.create_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)
            add_sizes(path, self.mesh, self.args)


def _left_to_trl(chat_template_path: str | None) -> str | None:
    """TRL reads Jinja files; a tokenizer's template has been taken by then, and the embeddings been resized."""
    return chat_template_path if chat_template_path is not None and is_jinja(chat_template_path) else None
