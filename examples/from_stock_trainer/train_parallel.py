"""Pretrain a small Llama on the data that `../stdlib_llama/prepare.py` makes."""

import argparse
from pathlib import Path

from datasets import load_from_disk
from transformers import AutoTokenizer, LlamaConfig

from hf_nanotron import AutoModelForCausalLM, NanotronTrainer as Trainer, NanotronTrainingArguments as TrainingArguments

HERE = Path(__file__).resolve().parent
PREPARED = HERE.parent / "stdlib_llama" / "out"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prepared", type=Path, default=PREPARED, help="folder with tokenizer/ and data/")
parser.add_argument("--output-dir", default=str(HERE / "out"))
parser.add_argument("--max-steps", type=int, default=100)
cli = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(cli.prepared / "tokenizer")
data = load_from_disk(str(cli.prepared / "data"))

args = TrainingArguments(
    output_dir=cli.output_dir,
    max_steps=cli.max_steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    tp_size=2,
    pp_size=2,
    learning_rate=6e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    weight_decay=0.1,
    logging_steps=10,
)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=tokenizer.model_max_length,
    initializer_range=0.06,
    bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)

trainer = Trainer(
    model=model,
    args=args,
    train_dataset=data["train"],
    eval_dataset=data["eval"],
    processing_class=tokenizer,
)
trainer.train()
trainer.evaluate()
trainer.save_model()
trainer.end()
