"""`hf-nanotron launch`: what is written, what is refused, and scripts that run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from pool import WorkerPool
from test_cli import command, one_line
from tiny import random_dataset
from transformers import AutoConfig

from hf_nanotron import NanotronTrainingArguments
from hf_nanotron.launch import hf_jobs, slurm
from hf_nanotron.launch.job import Environment, Job
from hf_nanotron.launch.rendering import template_text

MODEL = {
    "model_type": "llama", "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TOKEN = "hf_" + "a" * 30


def settings(folder: Path, **training: Any) -> dict[str, Any]:
    own = {"output_dir": str(folder / "out"), "max_steps": 8, "report_to": "none", **training}
    return {"model": {"config": MODEL}, "dataset": {"path": str(folder / "data")}, "training": own}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, in whose folder the test is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path)))
    return path


def written(*argv: str) -> Path:
    """The folder of the files that a launch has written."""
    code, out, err = command("launch", *argv)
    assert code == 0, err
    return Path(out.splitlines()[0]).parent


def options_of(script: str) -> list[str]:
    """Of sbatch, as it reads the lines."""
    return [" ".join(shlex.split(line)[1:]) for line in script.splitlines() if line.startswith("#SBATCH")]


def check_shell(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert not done.stderr, f"{done.stderr}\n{text}"


# ---- Slurm ----


def test_a_job_of_slurm_has_what_was_asked_for(run_file: Path) -> None:
    venv = run_file.parent / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    folder = written(
        *"--slurm run.yaml --nodes 16 --set tp_size 2 --partition gpu --account me --qos high --time 1-12".split(),
        *"--constraint h100 --cpus-per-node 96 --sbatch mail-type=END --sbatch mem=0 --chain 3".split(),
        *["--env", "NCCL_DEBUG=INFO", "--env", "GREETING=it's $HOME", "--secret", "WANDB_API_KEY", "--port", "29511"],
        *["--venv", str(venv), "--module", "cuda/13.0", "--setup", "ulimit -l unlimited", "--name", "big-run"],
    )
    assert folder == run_file.parent / "out" / "launch" and (folder / "logs").is_dir()
    script = (folder / "job.sh").read_text()
    check_shell(script)
    check_shell((folder / "submit.sh").read_text())
    assert options_of(script) == [
        "--job-name=big-run", "--nodes=16", "--ntasks-per-node=1", "--partition=gpu", "--account=me", "--qos=high",
        "--constraint=h100", "--time=1-12", "--cpus-per-task=96", "--gpus-per-node=8", "--exclusive", "--mail-type=END",
        "--mem=0", "--signal=B:USR1@150", "--requeue", "--open-mode=append", f"--output={folder}/logs/%j.log",
    ]  # fmt: skip
    assert "--nnodes 16 --nproc-per-node 8" in script and "port=29511" in script
    assert 'train "$config" --tp_size 2 --save_on_signal 120 --resume_from_checkpoint auto\n' in script
    assert (folder / "config.yaml").read_text() == run_file.read_text()
    # The environment of a node, in a shell: NCCL variables are only those that were asked for.
    lines = re.search(r"^environment\(\) \{\n.*?^\}", script, re.DOTALL | re.MULTILINE)
    assert lines is not None
    stand_in = "module() { echo module $*; }; ulimit() { echo ulimit $*; }"
    shell = f"{stand_in}\n{lines[0]}\nenvironment\nenv"
    done = subprocess.run(["bash", "-c", shell], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert not done.stderr and done.stdout.startswith("module load cuda/13.0\nulimit -l unlimited\n")
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert values["GREETING"] == "it's $HOME"
    assert {name for name in values if name.startswith("NCCL")} == {"NCCL_DEBUG"}


def test_conda_and_containers(run_file: Path, tmp_path: Path) -> None:
    script = (written("--slurm", "run.yaml", "--conda", "train", "--no-exclusive") / "job.sh").read_text()
    check_shell(script)
    (tmp_path / "conda").write_text("#!/bin/bash\necho 'conda() { echo conda $*; }'\n")
    (tmp_path / "conda").chmod(0o755)
    lines = re.search(r"^environment\(\) \{\n.*?^\}", script, re.DOTALL | re.MULTILINE)
    assert lines is not None and "--exclusive" not in script
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", f"{lines[0]}\nenvironment"], env=path, capture_output=True, text=True)
    assert done.stdout == "conda activate train\n" and "exec python -m torch" in script
    argv = ["--slurm", "run.yaml", "--overwrite", "--container", "org/image:1", "--mount", "/data set:/data"]
    script = (written(*argv) / "job.sh").read_text()
    check_shell(script)
    here = run_file.parent
    assert (
        f"--container-mounts='/data set:/data,{here}/out/launch:{here}/out/launch,{here}:{here},{here}/out:{here}/out'"
        in script
    )
    script = (written(*argv, "--container-runtime", "apptainer", "--set", "use_cpu", "true") / "job.sh").read_text()
    check_shell(script)
    assert "apptainer exec --bind" in script and "org/image:1 bash" in script and "--gpus-per-node" not in script


def test_a_cluster_has_a_template_of_its_own(run_file: Path, tmp_path: Path) -> None:
    code, out, _ = command("launch", "--slurm", "--print-template")
    assert code == 0 and out == template_text("slurm.sh.j2")
    own = tmp_path / "own.j2"
    own.write_text(
        '{% extends "slurm.sh.j2" %}\n{% block environment %}    source /opt/site.sh {{ job.nodes }}\n{% endblock %}\n'
    )
    script = (written("--slurm", "run.yaml", "--nodes", "4", "--template", str(own)) / "job.sh").read_text()
    check_shell(script)
    assert "    source /opt/site.sh 4\n" in script and "#SBATCH --nodes=4\n" in script
    for text, says in (
        ("{{ job.gpus }}", "has no attribute 'gpus'"),
        ("{{ cluster }}", "'cluster' is undefined"),
        ("\n{% if %}", "(line 2)"),
        ('{% extends "mine.j2" %}', "there is no template 'mine.j2'"),
    ):
        own.write_text(text)
        argv = ("launch", "--slurm", "run.yaml", "--overwrite", "--template", str(own))
        assert says in one_line(command(*argv)), text
    assert "#SBATCH --nodes=4\n" in (tmp_path / "out" / "launch" / "job.sh").read_text()  # nothing was written


def test_the_example_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of its README, in a copy of its folder."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    folder = shutil.copytree(EXAMPLES / "slurm", tmp_path / "slurm")
    monkeypatch.chdir(folder)
    (line,) = re.findall(r"^hf-nanotron launch (.*)$", (folder / "README.md").read_text(), re.MULTILINE)
    files = written(*shlex.split(line))
    script = (files / "job.sh").read_text()
    check_shell(script)
    assert files == folder / "out" / "llama-1b" / "launch"
    site = ["module load cuda/13.0 || exit 1", "export HF_HOME=$SCRATCH/huggingface", "export NCCL_SOCKET_IFNAME=hsn"]
    assert re.search(r"\s+".join(map(re.escape, [*site, "export PYTHONUNBUFFERED=1"])), script)
    assert "#SBATCH --time=24:00:00" in script and "seq 2 3" in (files / "submit.sh").read_text()


ENDS: list[tuple[str, int, str, bool]] = [
    # What srun does, the status of the script, what it says, and whether the run is finished then.
    ("exit 0", 0, "the run is finished", True),
    ("echo 'ValueError: no data' >rank-00000.log; exit 3", 3, "ValueError: no data", False),
    ("echo 'stopped after step 3 of 8' >rank-00000.log", -15, "saved; the job is queued again", False),
    ("kill -USR1 $PPID; sleep 0.1; mkdir out/checkpoint-3; exit 1", -15, "saved; the job is queued again", False),
    ("kill -USR1 $PPID; sleep 0.1; exit 1", 1, "it is not started again", False),
]


@pytest.mark.parametrize(("srun", "status", "says", "is_finished"), ENDS, ids=[srun for srun, *_ in ENDS])
def test_how_a_job_of_slurm_ends(srun: str, status: int, says: str, is_finished: bool, run_file: Path) -> None:
    """Its script, with stand-ins for Slurm's programs, in a folder whose name a shell would read otherwise."""
    place = run_file.parent / "it's $HOME"
    place.mkdir()
    folder = written("--slurm", "run.yaml", "--set", "output_dir", "out", "--chdir", str(place))
    programs = {
        "srun": srun.replace("rank-", "out/launch/logs/7-0/rank-"),
        # Slurm ends the script of a job that is queued again.
        "scontrol": 'case $1 in requeue) kill "$PPID" ;; *) echo node1 ;; esac',
        "scancel": "exit 0",
    }
    for name, text in programs.items():
        (run_file.parent / name).write_text(f"#!/bin/bash\n{text}\n")
        (run_file.parent / name).chmod(0o755)
    slurm_sets = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    path = f"{run_file.parent}:{os.environ['PATH']}"
    run = [str(folder / "job.sh")]
    done = subprocess.run(run, env={**slurm_sets, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    told = done.stdout.decode()
    assert done.returncode == status and says in told, told
    assert (folder / slurm.FINISHED).exists() == is_finished
    again = subprocess.run(run, env={**slurm_sets, "PATH": path}, capture_output=True, text=True)
    assert ("the run is finished; remove" in again.stdout) == is_finished


def test_nothing_is_overwritten_unasked(run_file: Path) -> None:
    folder = written("--slurm", "run.yaml")
    before = (folder / "job.sh").read_text()
    assert "Pass --overwrite" in one_line(command("launch", "--slurm", "run.yaml", "--nodes", "2"))
    assert (folder / "job.sh").read_text() == before
    (folder / slurm.FINISHED).touch()
    (folder / "mine.txt").touch()
    assert written("--slurm", "run.yaml", "--nodes", "2", "--overwrite") == folder
    assert (folder / "job.sh").read_text() != before
    assert not (folder / slurm.FINISHED).exists() and (folder / "mine.txt").exists()


REFUSED: list[tuple[str, str]] = [
    # As `train` says it on so many processes.
    ("--slurm run.yaml --nodes 2 --set tp_size 3", "does not divide the world size 16"),
    ("--slurm run.yaml --nodes 2 --set tp_size 8", "tp_size=8 cannot shard 4 attention heads"),
    ("--slurm run.yaml --nodes 2 --set model.config.intermediate_size 49 --set tp_size 2", "the 49 features"),
    ("--slurm run.yaml --set fp16 true", "fp16=True"),
    ("--slurm run.yaml --set pp_size 2", "gradient_accumulation_steps=1 is the number of micro-batches"),
    ("--slurm run.yaml --set training.hidden 3", "unknown key training.hidden"),
    ("--slurm run.yaml --set model.name_or_path /nowhere", "model needs either"),
    ("--slurm nowhere.yaml", "file not found"),
    ("--slurm", "CONFIG.yaml is missing"),
    # What a job cannot be.
    ("--slurm run.yaml --nodes 0", "--nodes 0"),
    ("--slurm run.yaml --gpus-per-node 0", "--gpus-per-node 0"),
    ("--slurm run.yaml --time soon", "'soon' is not a time of Slurm"),
    ("--slurm run.yaml --time 3", "leaves no time to train"),
    ("--slurm run.yaml --save-seconds 0", "--save-seconds 0"),
    ("--slurm run.yaml --set save_strategy no", "has nothing to go on from"),
    ("--slurm run.yaml --set save_only_model true", "weights alone"),
    ("--slurm run.yaml --set resume_from_checkpoint out/checkpoint-3", "an output_dir of its own"),
    ("--slurm run.yaml --set resume_from_checkpoint other/checkpoint-3", "other/checkpoint-3 is not a directory"),
    ("--slurm run.yaml --set model.revision main", "needs model.name_or_path"),
    # Keys of the run, as `train` takes them, and slips.
    ("--slurm run.yaml --nodes 2 --tp_size 3", "does not divide the world size 16"),
    ("--slurm run.yaml --training.hidden=3", "unknown key training.hidden"),
    ("--slurm run.yaml --partion gpu", "unrecognized argument --partion; did you mean --partition?"),
    ("--slurm run.yaml stray", "'stray' is not preceded by a --key"),
    ("--slurm --max_steps 3 run.yaml", "file not found: 3 (keys such as --max_steps come after CONFIG.yaml)"),
    ("--slurm run.yaml --sbatch time=3", "use --time"),
    ("--slurm run.yaml --sbatch 3", "is not an option of sbatch"),
    ("--slurm run.yaml --venv nowhere", "is no virtual environment"),
    ("--slurm run.yaml --venv a --conda b", "only one of them"),
    ("--slurm run.yaml --mount /a:/b", "needs --container"),
    ("--slurm run.yaml --chdir nowhere", "is not a folder"),
    ("--slurm run.yaml --name a/b", "--name 'a/b'"),
    ("--slurm run.yaml --port 99999", "at most 65535"),
    ("--slurm run.yaml --flavor h200", "--flavor is for --hf-jobs"),
    ("--skypilot run.yaml --partition gpu", "--partition is for --slurm, not for --skypilot"),
    ("--skypilot run.yaml --time 3", "--time is for --slurm and --hf-jobs"),
    ("--slurm run.yaml --template nowhere.j2", "nowhere.j2: file not found"),
    # Secrets.
    (f"--slurm run.yaml --env HF_TOKEN={TOKEN}", "(option --secret)"),
    (f"--slurm run.yaml --env GREETING={TOKEN}", "looks like a secret"),
    (f"--slurm run.yaml --set hub_token {TOKEN}", "holds a secret"),
    (f"--slurm run.yaml --hub_token {TOKEN}", "looks like a secret"),
    ("--slurm run.yaml --sbatch export=WANDB_API_KEY=abc123def", "--sbatch holds a secret"),
    ("--slurm run.yaml --container docker://me:pass@host/image", "--container holds a secret"),
    ("--slurm run.yaml --set dataset.path https://host/a.jsonl?token=true", "holds a secret"),
    ("--slurm run.yaml --setup 'echo a\nb'", "give each with an option"),
    ("--slurm run.yaml --env NCCL_DEBUG", "is not NAME=VALUE"),
    ("--slurm run.yaml --env 1A=2", "no name of a variable"),
    ("--slurm run.yaml --secret not-a-name", "no name of a variable"),
    # HF Jobs and SkyPilot.
    ("--hf-jobs run.yaml --flavor h200x8", "needs --image"),
    ("--hf-jobs run.yaml --image i", "needs --flavor"),
    ("--hf-jobs run.yaml --image i --flavor h200x8 --gpus-per-node 4 --folder f", "has 8 GPUs"),
    ("--hf-jobs run.yaml --image i --flavor cpu-basic --folder f", "has no GPUs"),
    ("--hf-jobs run.yaml --image i --flavor h200x8 --folder f", "is gone after the job"),
    ("--hf-jobs run.yaml --image i --flavor h200x8", "--folder where"),
    ("--hf-jobs run.yaml --image i --flavor h200x8 --folder f --mount /a:/b", "is not a volume of HF Jobs"),
    ("--hf-jobs run.yaml --image i --flavor h200 --folder f --set remote_checkpoints s3://b/r --time 1-0", "as 90m"),
    ("--skypilot run.yaml --folder f", "needs --accelerator"),
    ("--skypilot run.yaml --folder f --accelerator H100", "is gone after the job"),
    ("--skypilot run.yaml --folder f --accelerator H100 --set remote_checkpoints s3://b/r --mount x", "SOURCE:TARGET"),
    ("--skypilot run.yaml --folder f --accelerator H100 --resource image_id=x", "use --image-id"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "says"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_what_cannot_be_launched(argv: str, says: str, run_file: Path) -> None:
    line = one_line(command("launch", *shlex.split(argv)))
    assert says in line and TOKEN not in line
    assert sorted(path.name for path in run_file.parent.iterdir()) == ["run.yaml"]  # nothing was written


def test_secrets_of_a_file_are_not_copied(run_file: Path) -> None:
    for text in (f"# {TOKEN}\n", ""):
        training = {} if text else {"hub_token": TOKEN}
        run_file.write_text(text + yaml.safe_dump(settings(run_file.parent, **training)))
        line = one_line(command("launch", "--slurm", "run.yaml"))
        assert "looks like a secret" in line and TOKEN not in line
        assert not (run_file.parent / "out").exists()


def test_what_is_no_secret(run_file: Path) -> None:
    """A short word in the query of a URL; another one, and a secret of the environment however it is quoted, are."""
    own, data = settings(run_file.parent), {"text_column": "text", "sequence_length": 8}
    url = "https://host/a/corpus.jsonl?download=true&v=2"
    run_file.write_text(yaml.safe_dump({**own, "dataset": {"path": url, **data}}))
    assert url in (written("--slurm", "run.yaml", "--set", "dataset.name", url) / "job.sh").read_text()
    for url in ("https://host/a?key=0123456789", "https://host/a?v=2&X-Amz-Signature=ab", "https://me:you@host/a?v=2"):
        run_file.write_text(yaml.safe_dump({**own, "dataset": {"path": url, **data}}))
        assert "looks like a secret" in one_line(command("launch", "--slurm", "run.yaml", "--overwrite"))


def test_a_secret_of_the_environment_is_found_however_it_is_quoted(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "it's 50% of $x")
    for argv in (
        ["--run_name", "it's 50% of $x"],
        ["--env", "GREETING=it's 50% of $x"],
        ["--setup", "a it's 50% of $x"],
    ):
        assert "secret" in one_line(command("launch", "--slurm", "run.yaml", *argv)), argv
    run_file.write_text(yaml.safe_dump(settings(run_file.parent, run_name="it's 50% of $x")))
    assert "secret" in one_line(command("launch", "--slurm", "run.yaml"))
    assert not (run_file.parent / "out").exists()


def test_keys_of_the_run_follow_the_file(run_file: Path) -> None:
    """As `train` takes them, among the options of the launch; `--set` is another way to write one."""
    argv = "run.yaml --max_steps 3 --nodes 2 --lr_scheduler_kwargs {} --learning_rate=1e-4 --bf16 --set seed 7"
    script = (written("--slurm", *argv.split()) / "job.sh").read_text()
    assert "#SBATCH --nodes=2\n" in script
    words = "--seed 7 --max_steps 3 --lr_scheduler_kwargs '{}' --learning_rate=1e-4 --bf16 --save_on_signal 120"
    assert f'train "$config" {words} ' in script


def test_paths_begin_where_the_run_starts(run_file: Path) -> None:
    """Those of the file, of a model or a checkpoint, with --chdir."""
    there = run_file.parent / "there"
    (there / "model").mkdir(parents=True)
    config = AutoConfig.for_model(**{**MODEL, "num_attention_heads": 2})
    config.save_pretrained(there / "model")
    own = {"model": {"name_or_path": "./model"}, "dataset": {"path": "data"}, "training": {"output_dir": "out"}}
    run_file.write_text(yaml.safe_dump({**own, "training": {**own["training"], "tp_size": 4}}))
    assert "folder not found" in one_line(command("launch", "--slurm", "run.yaml"))
    line = one_line(command("launch", "--slurm", "run.yaml", "--chdir", "there"))
    assert "tp_size=4 cannot shard 2 attention heads" in line
    assert written("--slurm", "run.yaml", "--chdir", "there", "--tp_size", "1") == there / "out" / "launch"


def test_texts_of_every_kind_reach_the_run(run_file: Path) -> None:
    """Names and values that YAML or a shell would read otherwise."""
    text = 'it\'s "a" $HOME `b` \\n \U0001f600 é # x: y'
    own = settings(run_file.parent, run_name=text)
    run_file.write_text(yaml.safe_dump(own, allow_unicode=True), encoding="utf-8")
    extra = ["--env", f"ON={text}", "--secret", "NO", "--run_name", "'two\n lines'"]
    for argv, file, key in ((HUB, "hf_jobs.yaml", "env"), (SKY, "skypilot.yaml", "envs")):
        folder = written(*shlex.split(argv), "--overwrite", *extra)
        task = yaml.safe_load((folder / file).read_text(encoding="utf-8"))
        assert task[key]["ON"] == text and "NO" in task["secrets"]
        if key == "env":
            assert task["env"]["RUN_YAML"] == run_file.read_text(encoding="utf-8")
        script = task.get("script") or task["run"]
        check_shell(script)
        (words,) = re.findall(r"-m hf_nanotron.cli train \S+ (.*)", script)
        done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True)
        assert "'two\n lines'" in done.stdout.split("\0")


def test_slurm_is_absent(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for kind, program in (("--slurm", "sbatch"), ("--skypilot --set remote_checkpoints s3://b/r", "sky")):
        argv = [*shlex.split(kind), "run.yaml", "--folder", "files", "--submit"]
        argv += ["--accelerator", "H100"] if program == "sky" else []
        assert f"--submit: {program} is not on this machine" in one_line(command("launch", *argv))
    assert not Path("files").exists()


def test_times_of_slurm() -> None:
    """As the manual of sbatch has them."""
    hours = {"90": 1.5, "90:30": 1.5 + 30 / 3600, "24:00:00": 24, "2-0": 48, "1-12:30": 36.5, "0-0:0:36": 0.01}
    assert {text: slurm.seconds_of(text) / 3600 for text in hours} == pytest.approx(hours)
    assert slurm.seconds_of("UNLIMITED") == float("inf")


# ---- as on the ranks ----


def test_arguments_of_a_job_are_those_of_its_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "output_dir": str(tmp_path), "tp_size": 2, "pp_size": 2, "zero_stage": 2, "bf16": True, "tf32": True,
        "gradient_accumulation_steps": 4, "pp_layers_per_stage": "1,1", "tp_overlap": True, "ep_size": 4,
    }  # fmt: skip
    args = NanotronTrainingArguments.of_job(16, **given)
    assert (args.parallel.dp_size(16), args.parallel.pp_layers_per_stage, args.tf32) == (4, (1, 1), True)
    with pytest.raises(ValueError, match="ep_size=3 does not divide"):
        NanotronTrainingArguments.of_job(16, **{**given, "ep_size": 3})
    monkeypatch.setenv("WORLD_SIZE", "16")
    given |= {"ep_size": 3, "tf32": None}
    with pytest.raises(ValueError, match="ep_size=3 does not divide"):
        NanotronTrainingArguments(**given)


# ---- HF Jobs and SkyPilot ----


class Jobs(BaseHTTPRequestHandler):
    """What HF Jobs answer. The last job of a server that is `full` is refused."""

    def do_GET(self) -> None:
        self.answer(200, {"name": "me", "type": "user"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = self.server.asked  # type: ignore[attr-defined]
        asked.append((self.path, json.loads(body or b"{}")))
        if self.server.full and len(asked) == 2:  # type: ignore[attr-defined]
            return self.answer(402, {"error": "no credits"})
        self.answer(200, {"id": f"job{len(asked)}", "createdAt": "2026-01-01T00:00:00Z", "owner": {
            "id": "1", "name": "me", "type": "user"}, "status": {"stage": "RUNNING", "message": None}})  # fmt: skip

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def jobs_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub that this process's client asks."""
    server = HTTPServer(("127.0.0.1", 0), Jobs)
    server.asked, server.full = [], False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()


HUB = (
    "--hf-jobs run.yaml --nodes 2 --flavor h200x8 --image org/image --time 24h --folder files --attempts 2 "
    "--secret HF_TOKEN --env NCCL_DEBUG=INFO --mount hf://buckets/me/b/runs:/out --set output_dir /out/run"
)


def test_jobs_of_the_hub_are_submitted(run_file: Path, jobs_server: Any) -> None:
    """One for each node, in one network, through the Hub's own client; the token is in no file."""
    code, out, err = command("launch", *shlex.split(HUB), "--submit")
    assert code == 0, err
    (path, first), (_, second) = jobs_server.asked
    assert path == "/api/jobs/me" and first["secrets"] == {"HF_TOKEN": TOKEN}
    assert (first["flavor"], first["dockerImage"], first["timeoutSeconds"]) == ("h200x8", "org/image", 86400)
    assert first["attempts"] == 2 and first["volumes"] == [
        {"type": "bucket", "source": "me/b", "mountPath": "/out", "path": "runs"}
    ]
    assert first["network"]["group"] == second["network"]["group"]
    assert [job["network"]["aliases"] for job in (first, second)] == [["node-0"], ["node-1"]]
    assert [job["environment"]["NODE"] for job in (first, second)] == ["0", "1"]
    assert first["environment"]["RUN_YAML"] == run_file.read_text()
    assert first["command"] == second["command"] and first["command"][:2] == ["bash", "-c"]
    check_shell(first["command"][2])
    assert "--output_dir /out/run --resume_from_checkpoint auto" in first["command"][2]
    assert "jobs/me/job1" in out and TOKEN not in out + "".join(p.read_text() for p in Path("files").iterdir())


def test_jobs_of_the_hub_are_all_or_none(run_file: Path, jobs_server: Any) -> None:
    jobs_server.full = True
    code, out, err = command("launch", *shlex.split(HUB), "--submit")
    assert code == 2 and "402 Payment Required" in err and "Traceback" not in err and TOKEN not in err
    assert [path for path, _ in jobs_server.asked] == ["/api/jobs/me", "/api/jobs/me", "/api/jobs/me/job1/cancel"]


def test_what_the_template_of_the_hub_gets_wrong(run_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    for text, says in (
        ("script: x\ngpu: 1", "has gpu, which"),
        ("a: [", "not valid YAML"),
        ("image: x", "needs script"),
    ):
        own.write_text(text)
        assert says in one_line(command("launch", *shlex.split(HUB), "--template", str(own)))
    assert hf_jobs.devices_of("a10g-largex4") == 4 and hf_jobs.devices_of("rtx-pro-6000") == 1
    assert [hf_jobs.devices_of(name) for name in ("l40sx8", "cpu-upgrade", "h200", "l4x1")] == [8, None, 1, 1]


SKY = (
    "--skypilot run.yaml --nodes 2 --accelerator H100 --folder files --secret HF_TOKEN --env NCCL_DEBUG=INFO "
    "--mount s3://bucket/runs:/out --set output_dir /out/run --resource use_spot=true --image-id docker:org/image "
    "--setup 'pip install hf-nanotron' --venv ~/my-venv --chdir ."
)


def test_a_job_of_skypilot(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(*shlex.split(SKY))
    task = yaml.safe_load((folder / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["secrets"] == {"HF_TOKEN": None}
    assert task["resources"] == {"accelerators": "H100:8", "image_id": "docker:org/image", "use_spot": True}
    mounts = {"~/run.yaml": str(folder / "config.yaml"), "/out": {"source": "s3://bucket/runs", "mode": "MOUNT"}}
    assert task["file_mounts"] == mounts and task["envs"] == {"PYTHONUNBUFFERED": "1", "NCCL_DEBUG": "INFO"}
    assert task["workdir"] == str(tmp_path) and "source ~/my-venv/bin/activate\n" in task["run"]
    check_shell(task["run"])
    check_shell(task["setup"])
    # `sky` is called with the names of secrets alone.
    (tmp_path / "sky").write_text('#!/bin/bash\necho "$*" >called\n')
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    written(*shlex.split(SKY), "--overwrite", "--submit")
    called = (tmp_path / "called").read_text().split()
    assert called == ["jobs", "launch", "--yes", "--detach-run", "--secret", "HF_TOKEN", str(folder / "skypilot.yaml")]
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    assert sky.Task.from_yaml(str(folder / "skypilot.yaml")).num_nodes == 2


# ---- a run that may have checkpoints ----


def resume_with_auto(folder: str) -> list[tuple[int, str, str]]:
    argv = ["train", f"{folder}/run.yaml", "--resume_from_checkpoint", "auto", "--max_steps"]
    return [command(*argv, steps) for steps in ("2", "4")]


def test_auto_starts_and_goes_on(pool: WorkerPool, tmp_path: Path) -> None:
    """One command: first from the first step, then from the checkpoint; an error where all are damaged."""
    random_dataset(16).save_to_disk(tmp_path / "data")
    own = {"use_cpu": True, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path, **own)))
    results = pool.run(2, resume_with_auto, str(tmp_path))
    assert all(code == 0 for rank in results for code, _, _ in rank), results
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        path.write_text("{}")
    result, _ = pool.run(1, resume_with_auto, str(tmp_path))[0]
    assert "No valid checkpoint" in one_line(result)


def test_auto_begins_at_a_named_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    """A decay that branches off, twice the same command: the second goes on from its own checkpoint, also where the
    named one is gone."""
    random_dataset(16).save_to_disk(tmp_path / "data")
    own = {
        "use_cpu": True, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "max_steps": 2,
        "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 0},
    }  # fmt: skip
    file, out, branch = tmp_path / "run.yaml", tmp_path / "out", tmp_path / "branch"
    file.write_text(yaml.safe_dump(settings(tmp_path, **own)))
    argv = ["train", str(file), "--wsd_decay_steps", "2", "--resume_from_checkpoint", f"auto:{out}/checkpoint-2"]

    def logged() -> list[tuple[int, float, float]]:
        state = json.loads((branch / "trainer_state.json").read_text())
        return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in state["log_history"][:4]]

    assert pool.run(1, command, "train", str(file))[0][0] == 0
    assert "an output_dir of its own" in one_line(pool.run(1, command, *argv)[0])
    assert pool.run(1, command, *argv, "--output_dir", str(branch))[0][0] == 0
    first = logged()
    assert [step for step, *_ in first] == [1, 2, 3, 4] and first[3][2] < first[2][2]
    launched = ["launch", "--slurm", str(file), *argv[2:], "--output_dir", str(branch), "--chdir", str(tmp_path)]
    code, printed, err = command(*launched)
    assert code == 0, err
    script = Path(printed.splitlines()[0]).with_name("job.sh").read_text()
    assert f"--resume_from_checkpoint auto:{out}/checkpoint-2\n" in script
    shutil.rmtree(out)
    shutil.rmtree(branch / "checkpoint-4")
    code, _, err = pool.run(1, command, *argv, "--output_dir", str(branch))[0]
    assert code == 0 and logged() == first, err


def test_a_job_is_what_its_file_says() -> None:
    job = Job(
        "n", "", ("--a", "b"), "out", Path("/f"), Path("/w"), 3, 8, False, Environment(), None, 90.5, 1, True, "0"
    )
    assert (job.world_size, job.grace) == (24, 91)
    assert job.train_arguments == ("--a", "b", "--save_on_signal", "90.5", "--resume_from_checkpoint", "auto")
    values = [
        replace(job, begins_at=path).train_arguments[-1] for path in ("a/checkpoint-3", "a b: c # d/checkpoint-3")
    ]
    assert values[0] == "auto:a/checkpoint-3" and yaml.safe_load(values[1]) == "auto:a b: c # d/checkpoint-3"
