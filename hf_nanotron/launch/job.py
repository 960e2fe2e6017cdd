"""What is launched: a command of `hf-nanotron train` on several nodes, and the environment that it needs there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..redaction import holds_secret, printable

MARGIN = 15  # seconds that a script waits longer than the ranks themselves


@dataclass(frozen=True)
class Environment:
    """Where `python` is on a node, and what else is set there.

    Args:
        python: the interpreter, a path or a name.
        venv: folder of a virtual environment, activated first.
        conda: name or folder of a conda environment, activated first.
        modules: names of environment modules, loaded before it.
        setup: lines of shell that run last, on every node.
        variables: values by name.
        secrets: names of variables whose values are never written; the job gets them from where it is submitted.
        container: image in which nodes run.
        mounts: `SOURCE:TARGET`, of the container.

    Raises:
        ValueError: for a name that no shell takes, or a value that looks like a secret.
    """

    python: str = "python"
    venv: str | None = None
    conda: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    container: str | None = None
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.variables, *self.secrets):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{printable(name)!r} is no name of a variable; it has letters, digits and underscores."
                )
        for name, value in self.variables.items():
            if holds_secret(value, name):
                raise ValueError(
                    f"--env {name}=... looks like a secret, which is never written into a file: export it where you "
                    "submit the job, and give its name alone (option --secret)."
                )
        for line in self.setup:
            if holds_secret(line):
                raise ValueError(
                    f"--setup {printable(line)!r}: the line holds a secret, which is never written into a file; use a "
                    "variable, and give its name with --secret."
                )
            if "\n" in line or "\r" in line:
                raise ValueError(f"--setup {line!r} has several lines; give each with an option of its own.")
        if self.venv is not None and self.conda is not None:
            raise ValueError(f"--venv {self.venv} and --conda {self.conda}: only one of them can be activated.")


@dataclass(frozen=True)
class Job:
    """A run on `nodes` x `processes` GPUs (or CPU processes).

    Args:
        name: of the job and in its logs.
        config: text of the YAML file of the run.
        overrides: arguments of `hf-nanotron train` after the file.
        output_dir: as the run has it.
        folder: absolute path of the folder that gets the job's files.
        workdir: absolute path of the folder in which the run starts; relative paths of the file begin there.
        nodes: machines.
        processes: on each node, one for each of its GPUs.
        on_cpu: whether the run has `use_cpu=True`, so that no GPU is asked for.
        environment: of every process.
        port: of the rendezvous, on the first node; None lets the script choose.
        save_seconds: the run's `save_on_signal`; 0 if signals are left alone.
        chain: jobs, each after the one before.
        resumes: whether each start goes on from the newest checkpoint.
        max_restarts: how often torchrun starts the ranks anew after a failure, without the job ending.
        min_nodes: with which it goes on when others are lost; 0 for all.
        begins_at: the checkpoint of another run from which it begins where it has none; None for a fresh start.
        version: of the package that wrote the files.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    output_dir: str
    folder: Path
    workdir: Path
    nodes: int
    processes: int
    on_cpu: bool
    environment: Environment
    port: int | None
    save_seconds: float
    chain: int
    resumes: bool
    version: str
    begins_at: str | None = None
    max_restarts: int = 0
    min_nodes: int = 0

    def __post_init__(self) -> None:
        if not self.min_nodes:
            object.__setattr__(self, "min_nodes", self.nodes)

    @property
    def nnodes(self) -> str:
        """As torchrun takes it."""
        return str(self.nodes) if self.min_nodes == self.nodes else f"{self.min_nodes}:{self.nodes}"

    @property
    def restart_options(self) -> str:
        """Further options of torchrun, with a space before each."""
        return f" --max-restarts {self.max_restarts}" if self.max_restarts else ""

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.processes

    @property
    def grace(self) -> int:
        """Whole seconds that ranks have for a save after the signal."""
        return int(-(-self.save_seconds // 1))

    @property
    def train_arguments(self) -> tuple[str, ...]:
        """What follows the YAML file in the command: the user's overrides, and those that a restart needs."""
        own: tuple[str, ...] = ()
        if self.save_seconds:
            own = ("--save_on_signal", f"{self.save_seconds:g}")
        if self.resumes:
            auto = "auto" if self.begins_at is None else f"auto:{self.begins_at}"
            plain = re.fullmatch(r"[\w./:\-]+", auto)  # other values are read as YAML
            own += ("--resume_from_checkpoint", auto if plain else json.dumps(auto, ensure_ascii=False))
        return (*self.overrides, *own)
