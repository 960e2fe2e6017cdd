"""Write a copy of a model whose config takes longer rows, with rotary embeddings scaled by YaRN.

python extend.py out/short out/extended --sequence-length 16384

The weights are those of the short model: it has to be trained on long rows next. YaRN (Peng et al. 2023,
arXiv:2309.00071) divides the frequencies of slow rotations by the factor, and keeps fast ones.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

FILES = ("*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja")  # configs, weights, tokenizer and its template


def longer(config: PreTrainedConfig, sequence_length: int) -> dict[str, Any]:
    """Fields of the config of a model that takes rows of `sequence_length` tokens.

    Raises:
        SystemExit: if the model takes rows of that length already, or its rotary embeddings are not plain ones.
    """
    before, rope = config.max_position_embeddings, getattr(config, "rope_parameters", None) or {}
    if sequence_length <= before:
        raise SystemExit(f"the model takes rows of {before} tokens already; --sequence-length must be more than that.")
    if rope.get("rope_type") != "default":
        raise SystemExit(f"the model's rotary embeddings are {rope}; only rope_type 'default' can be extended.")
    yarn = {"rope_type": "yarn", "factor": sequence_length / before, "original_max_position_embeddings": before}
    return {"max_position_embeddings": sequence_length, "rope_parameters": {**rope, **yarn}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a Hub id")
    parser.add_argument("folder", type=Path, help="where the copy goes")
    parser.add_argument("--sequence-length", type=int, required=True)
    cli = parser.parse_args(argv)
    fields = longer(AutoConfig.from_pretrained(cli.model), cli.sequence_length)
    if (folder := Path(cli.model)).is_dir():
        if folder.resolve() == cli.folder.resolve():
            raise SystemExit(f"{cli.folder} is the model's own folder; say another one for the copy.")
        cli.folder.mkdir(parents=True, exist_ok=True)
        for path in {path for pattern in FILES for path in folder.glob(pattern)}:
            shutil.copy(path, cli.folder)
    else:
        snapshot_download(cli.model, local_dir=cli.folder, allow_patterns=list(FILES))
    AutoConfig.from_pretrained(cli.model, **fields).save_pretrained(cli.folder)
    print(f"{cli.folder}: {fields}")


if __name__ == "__main__":
    main()
