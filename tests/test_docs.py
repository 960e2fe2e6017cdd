"""The documentation says what is so: links, commands, settings, code, tables and error messages of its pages."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hf_nanotron import NanotronTrainingArguments, ParallelConfig
from hf_nanotron.cli.main import build_parser, parse
from hf_nanotron.cli.settings import check_complete, read_settings
from hf_nanotron.version import __version__

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Pages that GitHub alone shows: mkdocs checks the links of the others.
OUTSIDE = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("[ce]*/**/*.md")]
    if "out" not in path.parts
)
# Languages whose blocks are checked; a fence is indented where it stands in a list.
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHERS = "# huggingface/nanotron"  # begins a block of YAML that is not for us


def blocks(language: str, pages: list[Path]) -> list[Any]:
    """The blocks of a language, as parameters of a test, named by page and line."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block.group(1) == language:
                line = text[: block.start()].count("\n") + 1
                found.append(pytest.param(block.group(2), id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def settings_module() -> Any:
    spec = importlib.util.spec_from_file_location("tables", DOCS / "settings" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- links ----


def test_mkdocs_builds_strictly(tmp_path: Path) -> None:
    """A link to a page, a heading, a file or a name of the package that is not there fails."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "settings" / "mkdocs.yml")]
    built = subprocess.run([*command, "-d", str(tmp_path / "site")], capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr[-4000:]
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("NanotronTrainer.add_gradient_hook", "NanotronTrainingArguments", "AutoModelForCausalLM.from_config"):
        assert f'id="hf_nanotron.{name}"' in page


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_other_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}; there are {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- commands ----


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of `hf-nanotron` in a block of shell lines."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for start in (["hf-nanotron"], ["-m", "hf_nanotron.cli"]):
            for at in range(len(words)):
                if words[at : at + len(start)] == start and (len(start) == 2 or at == 0):
                    yield words[at + len(start) :]


@pytest.mark.parametrize("text", blocks("bash", [*PAGES, *OUTSIDE]))
def test_commands_are_those_of_the_command_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(text):
        try:
            args = parse(build_parser(), words)
        except SystemExit as end:  # --help and --version
            assert end.code == 0, f"{words}: {capsys.readouterr().err}"
            continue
        if hasattr(args, "overrides"):
            empty = tmp_path / "empty.yaml"
            empty.write_text("training: {}\n", encoding="utf-8")
            read_settings(empty, args.overrides)


@pytest.mark.parametrize("text", blocks("bash", [*PAGES, *OUTSIDE]))
def test_scripts_that_are_called_exist(text: str) -> None:
    for name in re.findall(r"(?:examples|conversions|tests|docs)/[\w./]+\.(?:py|sh|yml)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name
    for name in re.findall(r"-m (hf_nanotron[\w.]+)", text):
        assert importlib.util.find_spec(name) is not None, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rooms_and_files_of_the_package_exist(page: Path) -> None:
    """What stands in backquotes as `room/file` or `room/file.py`."""
    package = ROOT / "hf_nanotron"
    rooms = "|".join(path.name for path in package.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{rooms})/[a-z_/0-9]+(?:\.py)?)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not ((package / name).exists() or (package / f"{name}.py").exists())]


# ---- settings ----


@pytest.mark.parametrize("text", blocks("yaml", PAGES))
def test_settings_are_accepted(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    if text.startswith(OTHERS):
        with pytest.raises(ValueError, match="huggingface/nanotron"):
            read_settings(path, [])
        return
    sections, _ = read_settings(path, [])
    if "model:" in text:
        check_complete(sections)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sizes = {field.name for field in dataclasses.fields(ParallelConfig)}
    training = {key: value for key, value in sections["training"].items() if key not in sizes}
    parallel = ParallelConfig(**{key: value for key, value in sections["training"].items() if key in sizes})
    parallel.check_micro_batches(training.get("gradient_accumulation_steps", 1))
    NanotronTrainingArguments(**{**training, "output_dir": str(tmp_path), "use_cpu": True})


def test_the_reference_has_every_key() -> None:
    page = (DOCS / "yaml_reference.md").read_text(encoding="utf-8")
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(NanotronTrainingArguments) if field.init} - inherited
    assert own
    assert not {name for name in own if f"| `{name}` |" not in page}


def test_tables_are_up_to_date() -> None:
    tables = settings_module()
    stale = [page for page in tables.pages() if tables.renewed(page.read_text("utf-8")) != page.read_text("utf-8")]
    assert not stale, f"run `python docs/settings/tables.py`, which renews {stale}"
    assert {name for page in tables.pages() for _, name, _ in tables.MARK.findall(page.read_text("utf-8"))} == set(
        tables.TABLES
    )


# ---- code ----


@pytest.mark.parametrize("text", blocks("python", [*PAGES, *OUTSIDE]))
def test_code_compiles_and_its_imports_exist(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


# ---- error messages ----


def said_by_the_package() -> list[str]:
    """All texts of the package, with a NUL for what is filled in."""
    found = []
    for path in sorted((ROOT / "hf_nanotron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.ClassDef):
                found.append(node.name)
    return found


def test_messages_of_the_troubleshooting_page_are_the_packages() -> None:
    """A message that was reworded is to be found on the page by its new words."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| `")]
    quotes = [quote for cell in cells for quote in re.findall(r"(?<!\\)`((?:[^`\\]|\\.)+?)(?<!\\)`", cell)]
    assert len(quotes) > 150
    texts = said_by_the_package()
    missing = []
    for quote in quotes:
        parts = [part for part in re.split(r"\s*…\s*", quote.replace("\\`", "`")) if part.strip(" .=:")]
        pattern = re.compile(r".*?".join(map(re.escape, parts)), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            missing.append(quote)
    assert not missing, f"{len(missing)} of {len(quotes)} are said by nobody:\n" + "\n".join(missing)


# ---- versions ----


def test_versions_agree() -> None:
    """The tools of pre-commit are those that `make lint` runs, and a citation names the version."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if re.match(r"[\w.\-]+==", line)
    )
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    needs = [
        need for repo in hooks["repos"] for hook in repo["hooks"] for need in hook.get("additional_dependencies", [])
    ]
    assert sorted({need.split("==")[0] for need in needs}) == ["mypy", "ruff"]
    assert not {need for need in needs if need.split("==")[1] != pins[need.split("==")[0]]}
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda path: path.name)
def test_files_for_github_are_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))
