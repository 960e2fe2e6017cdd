"""What is installed on request alone: tests without it are skipped, and the package says what to install."""

from __future__ import annotations

import ast
from pathlib import Path

import fsspec
import pytest

from hf_nanotron.data.tokens.byte_ranges import file_system

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "hf_nanotron"
# What the extras of pyproject.toml bring, and what is imported of this package with one of them.
EXTRAS = {
    "matplotlib", "datatrove", "flash_attn", "quack", "fla", "causal_conv1d", "mamba_ssm", "s3fs", "gcsfs", "wandb",
    "trackio", "tensorboard", "trl", "peft", "boto3", "botocore", "moto", "flask", "flask_cors", "megatron", "debugpy",
    "ray", "sky",
}  # fmt: skip
WITH_TRL = "hf_nanotron.trl"


def unguarded(path: Path) -> list[str]:
    """Extras that a module imports when it is imported itself, without asking pytest first."""
    found, asked = [], set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "importorskip" in ast.dump(node.value):
            (name, *_) = node.value.args
            asked.add(ast.literal_eval(name).partition(".")[0])
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            extra = "trl" if name.startswith(WITH_TRL) else name.partition(".")[0]
            found += [f"{path.name}: {name}"] if extra in EXTRAS and extra not in asked else []
    return found


def test_tests_ask_for_what_is_installed_on_request() -> None:
    assert [each for path in sorted(TESTS.rglob("*.py")) for each in unguarded(path)] == []


def test_the_package_imports_nothing_of_it_before_it_is_needed() -> None:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "trl"]
    assert [each for path in paths for each in unguarded(path)] == []


@pytest.mark.parametrize(
    ("url", "says"),
    [("s3://bucket/x.ds", r"\(pip install 'hf-nanotron\[remote\]'\)"), ("gs://b/x.ds", r"'hf-nanotron\[gcs\]'")],
)
def test_a_file_system_that_is_missing(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install it to access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=says):
        file_system(url)
