"""The files for a debugger, and what the pages about debugging and several nodes tell to type."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_nanotron.cli.main import build_parser
from hf_nanotron.cli.settings import check_complete, read_settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "debugging"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def configurations() -> list[dict[str, Any]]:
    settings = json.loads((EXAMPLE / "launch.json").read_text(encoding="utf-8"))
    assert settings["version"] == "0.2.0"
    return settings["configurations"]


def program_of(arguments: list[str]) -> list[str]:
    """What torchrun starts: the arguments of `hf_nanotron.cli`."""
    return arguments[arguments.index("hf_nanotron.cli") + 1 :]


# ---- launch.json ----


@pytest.mark.parametrize("configuration", configurations(), ids=lambda entry: entry["name"])
def test_configurations_start_what_is_there(configuration: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, options of torchrun, commands and their files."""
    assert configuration["type"] == "debugpy" and configuration["justMyCode"] is False
    if configuration["request"] == "attach":
        assert str(configuration["connect"]["port"]) in (EXAMPLE / "debug_rank.py").read_text(encoding="utf-8")
        return
    monkeypatch.chdir(ROOT)
    arguments = configuration["args"]
    if configuration["module"] == "torch.distributed.run":
        from torch.distributed.run import get_args_parser

        known = get_args_parser().parse_args(arguments)
        assert known.module and known.training_script == "hf_nanotron.cli"
        arguments = program_of(arguments)
    elif configuration["module"] == "pytest":
        return
    parsed = build_parser().parse_args(arguments)
    settings, _ = read_settings(parsed.config, getattr(parsed, "overrides", []))
    check_complete(settings)


def test_places_for_breakpoints_exist() -> None:
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    table = page.partition("<!-- breakpoints: begin -->")[2].partition("<!-- breakpoints: end -->")[0]
    rows = re.findall(r"^\| .* \| `(hf_nanotron/[\w/]+\.py)` \| `(\w+)` \|$", table, re.MULTILINE)
    assert len(rows) == table.count("`hf_nanotron/") > 8
    for file, function in rows:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, function)


# ---- debugpy ----


class Client:
    """What an editor says to debugpy: messages of the Debug Adapter Protocol."""

    def __init__(self, port: int) -> None:
        deadline = time.monotonic() + 600
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=600)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.stream, self.number = self.socket.makefile("rb"), 0
        self.events: list[dict[str, Any]] = []

    def send(self, command: str, **arguments: Any) -> int:
        self.number += 1
        message = {"seq": self.number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        return self.number

    def _read(self) -> dict[str, Any]:
        length = 0
        while (line := self.stream.readline().strip()) or not length:
            assert line, "the connection has ended"
            length = int(line.partition(b":")[2]) if line.lower().startswith(b"content-length") else length
        return json.loads(self.stream.read(length))

    def answer(self, number: int) -> dict[str, Any]:
        while (message := self._read()).get("request_seq") != number:
            self.events.append(message)
        assert message["success"], message
        return message.get("body", {})

    def event(self, name: str) -> dict[str, Any]:
        while True:
            for index, message in enumerate(self.events):
                if message.get("event") == name:
                    return self.events.pop(index).get("body", {})
            self.events.append(self._read())

    def attach(self) -> int:
        self.answer(self.send("initialize", adapterID="test", linesStartAt1=True, columnsStartAt1=True))
        number = self.send("attach", justMyCode=False)
        self.event("initialized")
        return number

    def close(self) -> None:
        """debugpy's own process ends with its client; until then it holds what the rank prints to."""
        self.stream.close()
        self.socket.close()

    def stop_at(self, file: Path, line: int) -> None:
        found = self.answer(self.send("setBreakpoints", source={"path": str(file)}, breakpoints=[{"line": line}]))
        assert found["breakpoints"][0]["verified"], found


def test_one_rank_waits_for_a_debugger(port: int) -> None:
    """The others run on; the one runs when a client is there."""
    pytest.importorskip("debugpy")
    command = [sys.executable, str(EXAMPLE / "debug_rank.py"), "--rank", "1", "--port", str(port)]
    command += ["-m", "hf_nanotron.cli", "--version"]
    ranks = [
        subprocess.Popen(
            command, env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2"}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert ranks[0].communicate(timeout=600)[0].startswith("hf-nanotron ")
        client = Client(port)
        attached = client.attach()
        assert ranks[1].poll() is None
        client.send("configurationDone")
        client.answer(attached)
        client.event("terminated")
        client.close()
        out, said = ranks[1].communicate(timeout=600)
        assert ranks[1].returncode == 0 and out.startswith("hf-nanotron ")
        assert f"rank 1 waits for a debugger at 127.0.0.1:{port}" in said
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--rank", "2", "x.py"], "--rank 2 is none of the 2 ranks"), (["--rank", "0"], "give a program")],
)
def test_script_for_one_rank_says_what_is_wrong(argv: list[str], says: str) -> None:
    environment = {**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, str(EXAMPLE / "debug_rank.py"), *argv]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and says in result.stderr


def test_stepping_into_a_region_as_the_page_tells(pytestconfig: pytest.Config, tmp_path: Path, port: int) -> None:
    """Two ranks under torchrun, one of them stopped in `enter`, with the shapes that the page names."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    pytest.importorskip("debugpy")
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("torchrun ") and "debug_rank.py" in line)
    assert line in (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    words = [*shlex.split(line), "--output_dir", str(tmp_path / "out")]
    words[words.index("--rank") : words.index("--rank")] = ["--port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    running = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        client = Client(port)
        attached = client.attach()
        regions = ROOT / "hf_nanotron" / "parallel" / "tp" / "regions.py"
        lines = regions.read_text(encoding="utf-8").splitlines()
        start = next(n for n, text in enumerate(lines, 1) if text.startswith("    def enter("))
        place = next(n for n, text in enumerate(lines, 1) if n > start and "self._shape = hidden_of" in text)
        client.stop_at(regions, place)
        client.send("configurationDone")
        client.answer(attached)
        thread = client.event("stopped")["threadId"]
        frame = client.answer(client.send("stackTrace", threadId=thread))["stackFrames"][0]
        assert frame["name"].endswith("enter") and frame["line"] == place
        said = [
            client.answer(client.send("evaluate", expression=expression, frameId=frame["id"]))["result"]
            for expression in ("type(module).__name__", "tuple(hidden_of(args, kwargs).shape)", "module.training")
        ]
        assert said == ["'LlamaAttention'", "(2, 16, 32)", "True"]
        client.send("setBreakpoints", source={"path": str(regions)}, breakpoints=[])
        client.send("continue", threadId=thread)
        client.send("disconnect", terminateDebuggee=False)
        client.close()
        out = running.communicate(timeout=600)[0].decode()
        assert running.returncode == 0 and "train_loss" in out, out[-2000:]
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(600)


def test_dump_of_a_process_that_waits(pytestconfig: pytest.Config) -> None:
    if (
        not pytestconfig.getoption("full_matrix")
        or shutil.which("py-spy", path=str(Path(sys.executable).parent)) is None
    ):
        pytest.skip("runs with --full-matrix, where py-spy is installed")
    program = "def here():\n import time; print('here', flush=True); time.sleep(600)\nhere()"
    waiting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert waiting.stdout is not None and waiting.stdout.readline() == b"here\n"
        command = [str(Path(sys.executable).parent / "py-spy"), "dump", "--pid", str(waiting.pid)]
        assert "here" in subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    finally:
        waiting.kill()


# ---- several nodes ----


def block(page: str, name: str) -> list[str]:
    """The lines of shell between the marks `name`, without what continues them."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    inside = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    lines = re.search(r"```bash\n(.*?)```", inside, re.DOTALL)
    assert lines is not None
    return lines.group(1).strip().splitlines()


def small_run(folder: Path) -> Path:
    """The run of the debugger's example, as `run.yaml` in a folder."""
    sections = yaml.safe_load((EXAMPLE / "run.yaml").read_text(encoding="utf-8"))
    sections["dataset"]["path"] = str(EXAMPLE / "rows.jsonl")
    sections["training"]["output_dir"] = str(folder / "out")
    (folder / "run.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder


def test_two_agents_of_torchrun_are_two_nodes(pytestconfig: pytest.Config, tmp_path: Path, port: int) -> None:
    """The two lines of the page, typed on one machine: other names for the node, the port and the number of GPUs."""
    lines = block("several_nodes.md", "by hand")
    assert (
        len(lines) == 2 and lines[0].replace("--node-rank 0", "--node-rank 1").split("#")[0] == lines[1].split("#")[0]
    )
    from torch.distributed.run import get_args_parser

    for line in lines:
        get_args_parser().parse_args(shlex.split(line, comments=True)[1:])
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("the nodes run with --full-matrix")
    folder = small_run(tmp_path)
    agents = []
    for line in lines:
        words = [
            {"node0": "127.0.0.1", "29500": str(port), "8": "1"}.get(w, w) for w in shlex.split(line, comments=True)
        ]
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        agents.append(
            subprocess.Popen(
                command, env=ENVIRONMENT, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [agent.communicate(timeout=600)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], said
        assert "train_loss" in said[0] and (folder / "out" / "model.safetensors").is_file()
    finally:
        for agent in agents:
            agent.kill()


def typed(line: str, folder: Path, names: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """A line of torchrun of the page in `folder`, with other words for those of `names`, and more arguments."""
    words = [names.get(word, word) for word in shlex.split(line, comments=True)]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *more]
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def line_with(part: str) -> str:
    text = (ROOT / "docs" / "several_nodes.md").read_text(encoding="utf-8")
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("torchrun ") and part in line]
    return line


def losses(folder: Path) -> dict[int, float]:
    (state,) = folder.glob("out/trainer_state.json")
    logged = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in logged if "loss" in entry}


def test_what_is_to_be_checked_first(pytestconfig: pytest.Config, tmp_path: Path, port: int) -> None:
    """One node and two with half the accumulation have the same losses; what two have saved, they resume from."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    line, text = line_with("--max_steps 20"), (ROOT / "docs" / "several_nodes.md").read_text(encoding="utf-8")
    first, second = re.search(r"`(--max_steps 20 --save_steps 10)`, then `([^`]*)`", text).groups()  # type: ignore[union-attr]
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
        small_run(folder)
    layout = ("--tp_size", "1")
    alone = typed(line, one, {"8": "1"}, *layout)
    said = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, said
    assert not list(one.glob("out/checkpoint-*"))
    saves = ("--save_strategy", "steps", "--gradient_accumulation_steps", "1", *layout)
    for options in (first, second):
        names = {"node0": "127.0.0.1", "29500": str(port), "8": "1"}
        by_hand = block("several_nodes.md", "by hand")
        nodes = [typed(line, two, names, *saves, *options.split()) for line in by_hand]
        said = nodes[0].communicate(timeout=600)[0] + nodes[1].communicate(timeout=600)[0]
        assert [node.returncode for node in nodes] == [0, 0], said
    expected, found = losses(one), losses(two)
    assert sorted(found) == list(range(1, 31))
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= 1e-4 * loss, (step, loss, found[step])


def test_torchrun_starts_ranks_again(pytestconfig: pytest.Config, tmp_path: Path, port: int) -> None:
    """The line for nodes that are equal: a rank dies after a checkpoint, and all go on from there."""
    if not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    folder, names = small_run(tmp_path), {"node0:29500": f"127.0.0.1:{port}", "8": "1"}
    options = "--max_steps 60 --save_strategy steps --save_steps 10 --tp_size 2".split()
    line = line_with("--rdzv-backend c10d")
    nodes = [typed(line, folder, names, *options) for _ in range(2)]
    try:
        deadline = time.monotonic() + 600
        while not (folder / "out" / "checkpoint-10" / "training_state").is_dir():
            assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
            time.sleep(0.05)
        children = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text(encoding="utf-8").split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        said = [node.communicate(timeout=600)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert sorted(losses(folder)) == list(range(1, 61))
    finally:
        for node in nodes:
            node.kill()


def test_line_for_slurm_is_shell_and_torchrun() -> None:
    export, srun = block("several_nodes.md", "slurm")
    assert export.startswith("export MASTER_ADDR=$(scontrol show hostnames")
    words = shlex.split(srun)
    assert words[:4] == ["srun", "--ntasks-per-node", "1", "bash"] and words[4] == "-c"
    values = {"$SLURM_JOB_NUM_NODES": "2", "$SLURM_NODEID": "1", "$MASTER_ADDR": "node0"}
    inner = [values.get(word, word) for word in shlex.split(words[5])]
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(inner[1:])
    assert (known.nnodes, known.node_rank, known.module) == ("2", 1, True)
    build_parser().parse_args(program_of(inner))
