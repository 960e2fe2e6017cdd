"""A training step on a GPU: the host waits for nothing, and nothing is compiled after the first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pad_batch, random_dataset, tiny_config
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_nanotron import NanotronTrainer, NanotronTrainingArguments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NoSynchronisation(TrainerCallback):
    """Makes torch raise wherever the host would wait for the device, from step 3 to step 7."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self.graphs: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from torch._dynamo.utils import counters

        self.graphs.append(int(counters["stats"]["unique_graphs"]))
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.waits:
            torch.ones((), device="cuda").item()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("waits", [False, True])  # the second shows that the test can fail
def test_no_synchronisation_and_no_compilation_after_warm_up(tmp_path: Path, waits: bool) -> None:
    args = NanotronTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        bf16=True,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert args.torch_compile
    model = AutoModelForCausalLM.from_config(tiny_config())
    watch = NoSynchronisation(waits)
    trainer = NanotronTrainer(
        model=model, args=args, train_dataset=random_dataset(64), data_collator=pad_batch, callbacks=[watch]
    )
    try:
        if not waits:
            trainer.train()
            assert watch.graphs[2] > 0 and watch.graphs[2:] == [watch.graphs[2]] * len(watch.graphs[2:])
        else:
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.mesh.close()
