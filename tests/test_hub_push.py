"""Pushing to the Hub: the real ``huggingface_hub`` client and real training runs against a Hub on loopback.

``huggingface_hub`` reads its endpoint when it is imported, so everything that talks to the Hub runs in processes
started by the tests: this same file as a script, with the name of a worker function below as its first argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Commit, HubServer

TOKEN = "hf_loopback"
STEPS, SAVE_STEPS = 4, 2
SEQUENCE, SAMPLES = 16, 16


# ---- what the tests assert ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def reader(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(hub, tmp_path_factory.mktemp("reader")) as process:
        yield process


@pytest.fixture(scope="module")
def stock_logits(hub: HubServer, reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the stock Trainer's run pushed computes: the reference for runs of hf_nanotron on the same data."""
    return check_training_run(hub, reader, "tiny-stock", tmp_path_factory.mktemp("stock"), backend="transformers")


def test_client_round_trip(hub: HubServer, tmp_path: Path) -> None:
    """The plain client's pushes arrive as they are, and what it pulls is what it pushed."""
    run_worker(hub, tmp_path, "round_trip", "user/plain", str(tmp_path / "folder"))

    commits = hub.commits("user/plain")
    assert [commit.title for commit in commits] == [
        "initial commit",
        "Upload a folder",  # and no commit for the second upload of the unchanged folder
        "Upload from a future",
        "Delete and overwrite",
    ]
    assert commits[1].changed == {"README.md", "model.safetensors", "nested/deep/notes.txt", "nested/empty.txt"}
    assert commits[1].parent == commits[0].oid
    pushed = commits[1].files["model.safetensors"]
    assert pushed.lfs and pushed.data == (tmp_path / "folder/model.safetensors").read_bytes()
    assert not commits[1].files["nested/deep/notes.txt"].lfs
    assert hub.files("user/plain").keys() == {".gitattributes", "README.md", "model.safetensors", "future.bin"}
    assert hub.commits("user/plain", "side")[-1].title == "On the side"
    assert hub.files("user/plain", "side")["model.safetensors"].data == b"another model"
    assert hub.repos["user/plain"].private


def test_server_refuses(hub: HubServer, tmp_path: Path) -> None:
    """The server is worth pushing to only if it refuses what the Hub would refuse."""
    before = len(hub.errors)
    run_worker(hub, tmp_path, "refusals", "user/refusals")
    assert [commit.title for commit in hub.commits("user/refusals")] == ["initial commit", "Fine"]
    assert 501 not in {status for _, _, status in hub.requests} and len(hub.errors) == before


def test_stock_trainer_pushes(stock_logits: list[float], reader: Reader) -> None:
    """The reference itself; its training changed the model, or comparing others with it would prove nothing."""
    untrained = reader.ask(load=str(reader.start))
    assert max(abs(a - b) for a, b in zip(stock_logits, untrained["logits"], strict=True)) > 1e-2


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_nanotron_trainer_pushes(
    hub: HubServer,
    reader: Reader,
    stock_logits: list[float],
    tmp_path: Path,
    pytestconfig: pytest.Config,
    tp: int,
    pp: int,
) -> None:
    """The same script with hf_nanotron's classes leaves the same repository, and the same model in it."""
    if (tp, pp) == (1, 1) and not pytestconfig.getoption("full_matrix"):
        pytest.skip("runs with --full-matrix")
    name = f"tiny-tp{tp}-pp{pp}"
    logits = check_training_run(hub, reader, name, tmp_path, backend="hf_nanotron", tp=tp, pp=pp)
    assert logits == pytest.approx(stock_logits, abs=1e-5)


def check_training_run(
    hub: HubServer, reader: Reader, name: str, folder: Path, backend: str, tp: int = 1, pp: int = 1
) -> list[float]:
    """Train and push in other processes, check every commit against the checkpoints on disk, then load from the Hub.

    Returns the logits of the model as it is on the Hub at the end.
    """
    repo_id, out = f"user/{name}", folder / "out"
    arguments = [backend, repo_id, str(reader.start), str(out), str(tp), str(pp)]
    if backend == "hf_nanotron":
        run_worker(hub, folder, "train", *arguments, processes=tp * pp)
    else:
        reader.ask(train=arguments)

    paths = [path for method, path, _ in hub.requests if method == "GET" and repo_id in path]
    if backend == "hf_nanotron":
        assert sum(path.endswith("/model.safetensors") for path in paths) == (1 if pp == 1 else 0)
        assert pp == 1 or sum("/model-00001-of" in path for path in paths) == 1
        assert sum(path.endswith("/config.json") for path in paths) == 1
    commits = hub.commits(repo_id)
    assert [commit.title for commit in commits] == [
        "initial commit",
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    ]
    for commit, step in zip(commits[1:], (2, 4, 4), strict=True):
        check_model_files(commit, out / f"checkpoint-{step}")
    assert weights(commits[1]) != weights(commits[2]), "training went on between the two saves"
    assert "README.md" in commits[3].changed
    assert f"# {name}" in commits[3].files["README.md"].data.decode()
    assert not any(path.startswith(("checkpoint-", "_")) for path in commits[3].files)
    config = json.loads(commits[3].files["config.json"].data)
    assert config["architectures"] == ["LlamaForCausalLM"], "the Hub's readers know the stock class only"
    assert hub.repos[repo_id].private

    from_hub = reader.ask(load=repo_id)
    from_disk = reader.ask(load=str(out / f"checkpoint-{STEPS}"))
    assert from_hub["class"] == "LlamaForCausalLM"
    assert from_hub["text"] == from_disk["text"] == "pulled"
    assert from_hub["logits"] == from_disk["logits"]
    return from_hub["logits"]


def check_model_files(commit: Commit, checkpoint: Path) -> None:
    """The commit holds a complete model, with the very bytes of the checkpoint, its weights through LFS."""
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "training_args.bin"} <= commit.files.keys()
    shards = weights(commit)
    assert shards == {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")} != {}
    assert all(commit.files[path].lfs for path in shards)
    if index := commit.files.get("model.safetensors.index.json"):
        assert set(json.loads(index.data)["weight_map"].values()) == shards.keys()
    else:
        assert shards.keys() == {"model.safetensors"}
    assert commit.files["config.json"].data == (checkpoint / "config.json").read_bytes()


def weights(commit: Commit) -> dict[str, bytes]:
    return {path: file.data for path, file in commit.files.items() if path.endswith(".safetensors")}


# ---- worker processes -----------------------------------------------------------------------------------------------


def worker_env(hub: HubServer, home: Path) -> dict[str, str]:
    """A worker's environment: the Hub on loopback, an empty cache, one thread, the CPU, this checkout's package."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    here = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **hub.client_env(home), **here}


def run_worker(hub: HubServer, folder: Path, *arguments: str, processes: int = 1, timeout: float = 600) -> None:
    """Run a worker function of this file to its end, if asked for on several ranks; it has to succeed."""
    ranks = [str(Path(__file__).parent / "forked.py"), str(processes)]
    command = [sys.executable, *(ranks if processes > 1 else []), __file__, *arguments]
    log = folder / "worker.log"
    with log.open("w") as output:
        env = worker_env(hub, folder / "home")
        worker = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            status = worker.wait(timeout)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        finally:
            stop(worker)
    assert status == 0, f"{' '.join(arguments)} ended with {status}:\n{log.read_text()[-5000:]}"


def stop(worker: subprocess.Popen[bytes]) -> None:
    """End a worker that is still running, with the ranks that it has started: politely, then for certain."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        if worker.poll() is None:
            os.killpg(worker.pid, wish)
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(600)


class Reader:
    """A process with stock transformers only that loads models from the Hub or from disk, one after the other.

    It also makes the model and tokenizer that every run starts from, in ``start``, and trains with stock Trainer.
    """

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.start, self.log = folder / "start", (folder / "reader.log").open("w+")
        command = [sys.executable, __file__, "read", str(self.start)]
        env, pipe = worker_env(hub, folder / "home"), subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=self.log, text=True)

    def __enter__(self) -> Reader:
        try:
            self.answer()  # the start is written
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            stream.close()

    def ask(self, **request: str | list[str]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self, timeout: float = 600) -> dict[str, Any]:
        assert self.process.stdout is not None
        alarm = threading.Timer(timeout, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            self.log.seek(0)
            raise AssertionError(f"the reader ended:\n{self.log.read()[-5000:]}")
        return json.loads(line)


def read(start: str) -> None:
    """Worker: make the starting model, then answer requests to load a model or to train, a JSON object a line."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        set_seed,
    )

    out, sys.stdout = sys.stdout, sys.stderr  # answers only
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>", pad_token="<eos>").save_pretrained(start)
    set_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": 260, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**heads, **sizes, **tokens)).save_pretrained(start)
    print(json.dumps({"start": start}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "train" in request:
            train(*request["train"])
            print(json.dumps({}), file=out, flush=True)
            continue
        source = request["load"]
        assert "hf_nanotron" not in sys.modules, "what is on the Hub has to load with stock transformers alone"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        with torch.no_grad():
            logits = model(torch.arange(2 * SEQUENCE).view(2, SEQUENCE)).logits
        text = tokenizer.decode(tokenizer("pulled")["input_ids"], skip_special_tokens=True)
        answer = {"class": type(model).__name__, "text": text, "logits": logits.flatten().tolist()}
        print(json.dumps(answer), file=out, flush=True)


def train(backend: str, repo_id: str, start: str, out: str, tp: str, pp: str) -> None:
    """Worker: train ``start`` for a few steps, pushing every save, then push the end."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    # A user who moves from one backend to the other changes these imports and adds the sizes
    if backend == "hf_nanotron":
        from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

        trainer_class, arguments_class = NanotronTrainer, NanotronTrainingArguments
        sizes = {"tp_size": int(tp), "pp_size": int(pp)}
    else:
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        trainer_class, arguments_class, sizes = Trainer, TrainingArguments, {}

    class WaitForPush(TrainerCallback):
        """Pushes run in the background and are skipped while one is under way: let each one end, or fail, first."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            for job in getattr(getattr(trainer, "push_in_progress", None), "jobs", []):
                job.result(timeout=600)

        on_train_end = on_step_begin

    args = arguments_class(
        output_dir=out,
        use_cpu=True,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        push_to_hub=True,
        hub_model_id=repo_id,
        hub_strategy="every_save",
        hub_private_repo=True,
        **sizes,
    )
    parallel = {"parallel": args.parallel} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(start, **parallel)
    tokens = torch.randint(1, 256, (SAMPLES, SEQUENCE), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    tokenizer = AutoTokenizer.from_pretrained(start)
    trainer = trainer_class(
        model=model, args=args, train_dataset=samples, processing_class=tokenizer, callbacks=[WaitForPush()]
    )
    trainer.train()
    trainer.push_to_hub()
    if sizes:
        again = AutoModelForCausalLM.from_pretrained(repo_id, **parallel)  # by all ranks, out of one download
        ours = dict(trainer.model.named_parameters())
        assert all(torch.equal(weight, ours[name]) for name, weight in again.named_parameters())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def round_trip(repo_id: str, folder: str) -> None:
    """Worker: use the client as users do, and compare what comes back."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import get_session

    source = Path(folder)
    (source / "nested/deep").mkdir(parents=True)
    (source / "README.md").write_text("---\ntags: [tiny, test]\n---\n# A card\n")
    (source / "model.safetensors").write_bytes(os.urandom(300_000))
    (source / "nested/empty.txt").write_bytes(b"")
    (source / "nested/deep/notes.txt").write_text("notes\n")
    files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())

    api = HfApi()
    assert api.whoami()["name"] == "user"
    url = api.create_repo(repo_id.split("/")[1], private=True)
    assert url.repo_id == repo_id == api.create_repo(repo_id, private=True, exist_ok=True).repo_id
    first = api.upload_folder(repo_id=repo_id, folder_path=source, commit_message="Upload a folder")
    again = api.upload_folder(repo_id=repo_id, folder_path=source, commit_message="Nothing new")
    assert first.oid == again.oid

    assert sorted(api.list_repo_files(repo_id)) == [".gitattributes", *files]
    tree = {entry.path: entry for entry in api.list_repo_tree(repo_id)}
    assert tree.keys() == {".gitattributes", "README.md", "model.safetensors", "nested"}
    assert tree["model.safetensors"].lfs.size == 300_000 and tree["README.md"].lfs is None
    assert [entry.path for entry in api.list_repo_tree(repo_id, "nested")] == ["nested/deep", "nested/empty.txt"]
    info = api.model_info(repo_id)
    assert info.sha == first.oid and info.private and info.tags == ["tiny", "test"]

    future = api.upload_file(
        repo_id=repo_id,
        path_in_repo="future.bin",
        path_or_fileobj=b"from a future",
        commit_message="Upload from a future",
        run_as_future=True,
    )
    assert future.result(timeout=600).oid == api.repo_info(repo_id).sha

    api.create_branch(repo_id, branch="side", revision=first.oid)
    api.create_branch(repo_id, branch="side", exist_ok=True)
    another = CommitOperationAdd("model.safetensors", b"another model")
    api.create_commit(repo_id, [another], commit_message="On the side", revision="side")
    operations = [CommitOperationDelete("nested/"), CommitOperationAdd("README.md", b"# Rewritten\n")]
    api.create_commit(repo_id, operations, commit_message="Delete and overwrite")

    snapshot = Path(snapshot_download(repo_id, revision=first.oid))
    for name in files:
        assert (snapshot / name).read_bytes() == (source / name).read_bytes(), name
    assert Path(hf_hub_download(repo_id, "model.safetensors", revision="side")).read_bytes() == b"another model"
    assert Path(hf_hub_download(repo_id, "README.md")).read_text() == "# Rewritten\n"
    assert not (Path(snapshot_download(repo_id)) / "nested").exists()

    address = f"{api.endpoint}/{repo_id}/resolve/side/model.safetensors"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
    for wanted, content in (("0-6", b"another"), ("8-", b"model"), ("-3", b"del")):
        part = get_session().get(address, headers={**headers, "Range": f"bytes={wanted}"})
        assert (part.status_code, part.content) == (206, content)
    assert get_session().get(address, headers={**headers, "Range": "bytes=99-"}).status_code == 416

    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "nested/deep/notes.txt")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(repo_id, revision="no-such-branch")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/no-such-model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo_id, token=False)  # private


def refusals(repo_id: str) -> None:
    """Worker: everything here is refused by the server, and the client says so, except one commit."""
    import hashlib

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.utils import get_session

    @contextlib.contextmanager
    def refused(status: int, error: type[HfHubHTTPError] = HfHubHTTPError) -> Iterator[None]:
        with pytest.raises(error) as caught:
            yield
        assert caught.value.response.status_code == status

    api, stranger = HfApi(), HfApi(token="hf_wrong")
    api.create_repo(repo_id)
    head = api.model_info(repo_id).sha
    for client in (stranger, HfApi(token=False)):
        with refused(401):
            client.create_repo("user/of-a-stranger")
        with refused(401):
            client.upload_file(repo_id=repo_id, path_in_repo="a.txt", path_or_fileobj=b"a")
    with refused(401):
        stranger.whoami()
    assert HfApi(token=False).model_info(repo_id).sha == head  # public

    with refused(409):
        api.create_repo(repo_id)
    with refused(404):
        api.upload_file(repo_id=repo_id, path_in_repo="a.txt", path_or_fileobj=b"a", revision="no-such-branch")
    with refused(404, EntryNotFoundError):
        api.create_commit(repo_id, [CommitOperationDelete("not-there.txt")], commit_message="Delete nothing")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=b"---\ntags: [open\n---\n")
    upload = {"repo_id": repo_id, "path_in_repo": "a.txt", "path_or_fileobj": b"a"}
    api.upload_file(**upload, commit_message="Fine", parent_commit=head)
    with refused(412):
        api.upload_file(**{**upload, "path_or_fileobj": b"b"}, parent_commit=head)

    # an LFS object is stored only with the announced bytes, and committed only if it was stored
    model = CommitOperationAdd("model.safetensors", b"not what was announced")
    model.upload_info.sha256 = hashlib.sha256(b"announced").digest()
    with pytest.raises(RuntimeError, match="Error while uploading") as failed:
        api.create_commit(repo_id, [model], commit_message="Torn")
    assert "announced were 22 bytes" in str(failed.value.__cause__)
    lines = [
        {"key": "header", "value": {"summary": "Without its object", "description": ""}},
        {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}},
    ]
    body = "\n".join(map(json.dumps, lines))
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
    answer = get_session().post(f"{api.endpoint}/api/models/{repo_id}/commit/main", headers=headers, content=body)
    assert answer.status_code == 400 and "was not uploaded" in answer.text


if __name__ == "__main__":
    {function.__name__: function for function in (read, train, round_trip, refusals)}[sys.argv[1]](*sys.argv[2:])
