"""The guides, run from top to bottom: what they have you save is saved, and each command is run where it stands.

Commands are those of the page; only numbers are smaller, so that a test does not train for minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from pool import WorkerPool
from test_cli import command

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMALLER = {
    "vocab_size=2048": "vocab_size=320",
    "max_steps: 60": "max_steps: 3",
    "warmup_steps: 6": "warmup_steps: 1",
    "eval_steps: 20": "eval_steps: 2",
    "save_steps: 20": "save_steps: 2",
    "logging_steps: 5": "logging_steps: 1",
    "num_hidden_layers: 4": "num_hidden_layers: 2",
    "hidden_size: 128": "hidden_size: 32",
    "intermediate_size: 256": "intermediate_size: 64",
    "sequence_length: 256": "sequence_length: 32",
    "max_steps=4": "max_steps=1",
}
BLOCK = re.compile(r"^```(bash|yaml|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Guide:
    """A page that is followed in a folder."""

    def __init__(self, page: str, folder: Path, pool: WorkerPool) -> None:
        self.text, self.folder, self.pool = (DOCS / page).read_text(encoding="utf-8"), folder, pool
        self.ran: list[str] = []

    def follow(self, replace: dict[str, Any]) -> None:
        """Run all blocks. `replace` maps the start of a line to a function that runs it."""
        for block in BLOCK.finditer(self.text):
            language, content = block.groups()
            for old, new in SMALLER.items():
                content = content.replace(old, new)
            before = self.text[: block.start()].rstrip().rsplit("\n", 1)[-1]
            named = re.search(r"Save this as `([\w.]+)`:$", before) or re.match(r"# (\w+\.py)\n", content)
            if named is not None:
                (self.folder / named.group(1)).write_text(content, encoding="utf-8")
            elif language == "bash":
                for line in content.splitlines():
                    self._run(line, replace)

    def _run(self, line: str, replace: dict[str, Any]) -> None:
        self.ran.append(line)
        for start, function in replace.items():
            if line.startswith(start):
                function(line)
                return
        words = [word for word in shlex.split(line) if word != "OMP_NUM_THREADS=1"]
        if words[0] == "torchrun":
            count = int(words[words.index("--nproc-per-node") + 1])
            at = words.index("-m") + 2 if "-m" in words else None
            if at is None:
                results = self.pool.run(count, script, str(self.folder), words[-1])
            else:
                results = self.pool.run(count, within, str(self.folder), words[at:])
        elif words[0] == "hf-nanotron":
            results = self.pool.run(1, within, str(self.folder), words[1:])
        elif words[0] == "python":
            results = self.pool.run(1, script, str(self.folder), words[1])
        else:
            subprocess.run(["bash", "-ec", line], cwd=self.folder, env=environment(), check=True, timeout=600)
            return
        for code, _, said in results:
            assert code == 0, f"{line}: {said[-3000:]}"


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def within(folder: str, words: list[str]) -> tuple[int, str, str]:
    here = os.getcwd()
    os.chdir(folder)
    on_cpu = ("--use_cpu", "--disable_tqdm") if words[0] == "train" else ()
    try:
        return command(*words, *on_cpu)
    finally:
        os.chdir(here)


def script(folder: str, name: str) -> tuple[int, str, str]:
    here = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(Path(name).read_text(), name, "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(here)
    return 0, "", ""


def test_first_training(pool: WorkerPool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """From text files to a pushed model. (By default the commands are parsed, in test_docs.py.)"""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    guide = Guide("first_training.md", tmp_path, pool)

    def few_texts(line: str) -> None:
        """After the files were sorted: a few small ones are enough."""
        subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True, timeout=600)
        for folder, count in (("texts", 6), ("held_out", 2)):
            for path in sorted((tmp_path / folder).iterdir(), key=lambda path: path.stat().st_size)[count:]:
                path.unlink()

    def stopped(line: str) -> None:
        """The first job ends at step 2, as if it had been stopped there."""
        guide._run(f"{line} --max_steps 2", {})

    def push(line: str) -> None:
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        with HubServer(token="hf_loopback") as hub:
            env = {**environment(), **hub.client_env(tmp_path / "home")}
            line = line.replace("YOU/", "user/")
            subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=env, check=True, timeout=600)
            files = set(hub.files("user/first-llama"))
        assert {"config.json", "tokenizer.json"} <= files and any(name.endswith(".safetensors") for name in files)
        assert not [name for name in files if name.startswith(("checkpoint-", "_"))]

    first = "OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4"
    guide.follow({"mv texts": few_texts, first: stopped, "hf upload": push})
    assert (tmp_path / "out" / "checkpoint-3").is_dir() and (tmp_path / "out_python" / "model.safetensors").is_file()
    assert len(guide.ran) >= 11


@pytest.mark.parametrize("page", ["reporting.md"])
def test_other_guides(pool: WorkerPool, tmp_path: Path, page: str) -> None:
    """Their commands go on from the files of the first training."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install hf-nanotron[tensorboard])")
    from test_cli import tokenizer

    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.txt").write_text(" ".join(f"w{3 + n % 50}" for n in range(2000)))
    assert (
        pool.run(1, within, str(tmp_path), ["tokenize", "corpus.txt", "tokens", "--tokenizer", "tokenizer"])[0][0] == 0
    )
    shutil.copytree(tmp_path / "tokens", tmp_path / "held_out_tokens")
    first = Guide("first_training.md", tmp_path, pool)
    first.text = re.search(r"Save this as `first.yaml`:\n\n```yaml\n.*?```", first.text, re.DOTALL).group(0)  # type: ignore[union-attr]
    first.follow({})
    Guide(page, tmp_path, pool).follow({})
    assert list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))
