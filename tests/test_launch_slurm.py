"""Jobs that `hf-nanotron launch` writes, run: by a Slurm on this machine, and by the shells of other clusters."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import preloaded_python
import pytest
import slurm_cluster
import yaml
from pool import WorkerPool
from slurm_cluster import SlurmCluster
from test_cli import command
from test_launch import settings
from tiny import random_dataset

ROOT = Path(__file__).resolve().parent.parent
STEPS = 240
RUN = {
    "use_cpu": True, "max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 5e-3,
    "save_steps": STEPS, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run and its data, and a name that no shell and no Slurm is to read."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    folder = tmp_path / "it's a `run` of $HOME, 50%j #1"
    random_dataset(600).save_to_disk(folder / "data")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder, **RUN)))
    return folder


@pytest.fixture
def python(pool: WorkerPool) -> Iterator[Path]:
    """What runs the command in the place of python, without the seconds of its imports."""
    pool.run(1, os.getpid)  # its fork server is there
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has to be short
        path, address = Path(folder, "python"), Path(folder, "socket")
        preloaded_python.write_python(path, address)
        server = multiprocessing.get_context("forkserver").Process(target=preloaded_python.serve, args=(address,))
        server.start()
        while not address.exists():
            assert server.is_alive()
            time.sleep(0.05)
        yield path
        server.kill()
        server.join()


def losses(output_dir: Path) -> dict[int, float]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def unbroken(pool: WorkerPool, folder: Path, world_size: int = 2, *overrides: str) -> dict[int, float]:
    """The losses of the run on as many processes, without a stop."""
    out = folder / "unbroken"
    results = pool.run(
        world_size, command, "train", str(folder / "run.yaml"), "--output_dir", json.dumps(str(out)),
        "--save_strategy", "no", *overrides,
    )  # fmt: skip
    assert all(code == 0 for code, _, _ in results), results
    return losses(out)


def submit(cluster: SlurmCluster, folder: Path, *options: str) -> list[str]:
    """Write the job as a user would, and submit it: the numbers of its jobs."""
    code, out, err = command(
        "launch", "--slurm", str(folder / "run.yaml"), "--gpus-per-node", "1", "--chdir", str(ROOT), "--env",
        "OMP_NUM_THREADS=1", *options,
    )  # fmt: skip
    assert code == 0, err
    return cluster.run("bash", str(folder / "out" / "launch" / "submit.sh")).split()


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_job_saves_is_queued_again_and_goes_on(
    cluster: SlurmCluster, pool: WorkerPool, folder: Path, python: Path
) -> None:
    """The signal of the time limit, sent by hand: ranks save, the job is queued again and has the losses of a run
    without a stop, and the job after it finds the run finished."""
    first, second = submit(
        cluster, folder, "--nodes", "2", "--chain", "2", "--save-seconds", "300", "--python", str(python)
    )
    logs = folder / "out" / "launch" / "logs"
    assert f"Dependency=afterany:{first}" in cluster.run("scontrol", "show", "job", second)
    cluster.wait(lambda: "'loss'" in text(logs / f"{first}-0" / "rank-00000.log"))
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    expected = unbroken(pool, folder)  # meanwhile
    cluster.wait(cluster.is_idle)

    told = text(logs / f"{first}.log")
    assert (
        "ranks save and stop" in told and "the job is queued again" in told and told.endswith("the run is finished\n")
    )
    assert "the run is finished; remove" in text(logs / f"{second}.log")
    for attempt in (f"{first}-0", f"{first}-1"):
        names = sorted(path.name for path in (logs / attempt).glob("*.log"))
        assert names == ["node-0.log", "node-1.log", "rank-00000.log", "rank-00001.log"]
        for rank in range(2):
            assert text(logs / attempt / f"rank-{rank:05}.log").startswith(f"rank {rank} of 2, on ")
    stopped = text(logs / f"{first}-0" / "rank-00000.log")
    assert "SIGUSR1: saving, then stopping." in stopped + text(logs / f"{first}-0" / "rank-00001.log")
    step = int(stopped.partition("stopped after step ")[2].split()[0])
    assert 0 < step < STEPS and f"stopped after step {step} of {STEPS}" in stopped
    assert (folder / "out" / f"checkpoint-{step}").is_dir() and (folder / "out" / "model.safetensors").is_file()
    got = losses(folder / "out")
    assert got == pytest.approx(expected, rel=1e-6) and len(got) == STEPS


TESTS_OF_OTHERS = """
import signal, slurm_cluster
with slurm_cluster.SlurmCluster() as cluster:
    print(cluster.folder, cluster.run("sbatch", "--parsable", "--wrap", "sleep 600"), flush=True)
    signal.pause()
"""


def test_nothing_of_a_cluster_is_left(cluster: SlurmCluster) -> None:
    """When its tests are killed. Another one, of other tests at the same time, goes on."""
    tests = subprocess.Popen(
        [sys.executable, "-c", TESTS_OF_OTHERS], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    folder, number = tests.stdout.readline().split()
    there = slurm_cluster.processes_of(Path(folder))
    assert len(there) >= 4 and int(number) > 0
    tests.kill()
    tests.wait()
    cluster.wait(lambda: not Path(folder).exists())
    assert not slurm_cluster.processes_of(Path(folder))
    assert cluster.run("sinfo", "--noheader", "--format=%D").split() == ["2"]


def test_a_failure_is_shown_and_not_repeated(cluster: SlurmCluster, folder: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    shutil.rmtree(folder / "data")
    (first,) = submit(cluster, folder, "--nodes", "2")
    cluster.wait(cluster.is_idle)
    told = text(folder / "out" / "launch" / "logs" / f"{first}.log")
    assert "the run failed with status 1" in told and "dataset.path" in told and "queued again" not in told
    assert not (folder / "out" / "launch" / "finished").exists()


def test_the_time_limit_and_a_chain(
    cluster: SlurmCluster, pool: WorkerPool, folder: Path, pytestconfig: pytest.Config
) -> None:
    """Slurm's own signal before a limit of two minutes, no requeue: the next job of the chain goes on, on two ranks a
    node."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    more = ["--set", "max_steps", "4000", "--set", "tp_size", "2", "--gpus-per-node", "2"]
    options = ["--nodes", "2", "--chain", "6", "--no-requeue", "--time", "2", "--save-seconds", "10", *more]
    ids = submit(cluster, folder, *options)
    cluster.wait(cluster.is_idle)
    logs = folder / "out" / "launch" / "logs"
    told = [text(logs / f"{number}.log") for number in ids]
    assert "saved; the next job goes on" in told[0] and "the run is finished\n" in "".join(told)
    assert len(list((logs / f"{ids[0]}-0").glob("rank-*.log"))) == 4
    got = losses(folder / "out")
    assert got == pytest.approx(unbroken(pool, folder, 4, "--max_steps", "4000", "--tp_size", "2"), rel=1e-5)


@pytest.mark.parametrize("kind", ["hf-jobs", "skypilot"])
def test_the_scripts_of_other_clusters_train(
    kind: str,
    pool: WorkerPool,
    folder: Path,
    port: int,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What each node would run, in two shells of this machine, with the variables that the cluster sets."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("with --full-matrix")
    common = ["--nodes", "2", "--gpus-per-node", "1", "--port", str(port), "--python", sys.executable]
    hub = ["--flavor", "cpu-basic", "--image", "org/image", "--mount", f"hf://buckets/me/b:{folder}"]
    sky = ["--mount", f"s3://bucket/run:{folder}"]
    files = folder / "files"
    argv = ["launch", f"--{kind}", str(folder / "run.yaml"), "--folder", str(files), *common]
    code, _, err = command(*argv, *(hub if kind == "hf-jobs" else sky))
    assert code == 0, err
    home = folder / "home"
    home.mkdir()
    shutil.copy(files / "config.yaml", home / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    task = yaml.safe_load((files / f"{kind.replace('-', '_')}.yaml").read_text())
    nodes: list[tuple[str, dict[str, Any]]] = [
        (task["script"].replace("${HF_NETWORK_GROUP_PREFIX}node-0", "127.0.0.1"), {**task["env"], "NODE": str(node)})
        if kind == "hf-jobs"
        else (task["run"], {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NODE_RANK": str(node)})
        for node in range(2)
    ]
    running = [
        subprocess.Popen(["bash", "-c", script], env={**environment, **values}, stderr=subprocess.PIPE, text=True)
        for script, values in nodes
    ]
    ends = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], ends
    assert losses(folder / "out") == pytest.approx(unbroken(pool, folder), rel=1e-6)
