"""No secret is written or printed: not in checkpoints, on the Hub, in logs, in what a user pickles, nor in errors.

What counts as one is in ``test_redaction.py``. The run is a process of its own (this file as a script), since
``huggingface_hub`` reads its endpoint when it is imported.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import traceback
import zipfile
from dataclasses import dataclass, field
from multiprocessing import context
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from transformers.trainer_callback import ExportableState, TrainerCallback

from hf_nanotron.cli import main
from hf_nanotron.training_args import NanotronTrainingArguments

HF = "hf_" + "Zx9" * 12
HUB_TOKEN = "the-5ecret-of-the-hub"  # of no known shape: found by the field's name

# What stands in fields of a run, and what must be found nowhere.
FIELDS: dict[str, tuple[Any, list[str]]] = {
    "hub_token": (HUB_TOKEN, [HUB_TOKEN]),
    "push_to_hub_token": ("pushing-5ecret", ["pushing-5ecret"]),
    "run_name": (f"https://me:runname-5ecret@host/{HF}", ["runname-5ecret", HF]),
    "project": (f"a project of {HUB_TOKEN}", [HUB_TOKEN]),
    "trackio_space_id": ("https://trackio-5ecret@host/space?x=1", ["trackio-5ecret"]),
    "resume_from_checkpoint": ("s3://AKIAKEY5ecret:aws/5ecret+@bucket/run", ["AKIAKEY5ecret", "5ecret+"]),
    "remote_checkpoints": ("sftp://me:p%40ss-5ecret@host/run?sig=sig-5ecret", ["ss-5ecret", "sig-5ecret"]),
    "wandb_api_key": ("wandb-5ecret", ["wandb-5ecret"]),
    "trackio_key": ("ghp_" + "5ecret" * 6, ["5ecret5ecret"]),
    "storage_options": (
        {"key": "opt-key-5ecret", "client_kwargs": {"aws_session_token": "session-5ecret", "region_name": "x"}},
        ["opt-key-5ecret", "session-5ecret"],
    ),
    "deep": ([({"password": "deep-5ecret"},), f"Bearer {HF}"], ["deep-5ecret", HF]),
    "copies": (f"password=pair-5ecret and {HF}", ["pair-5ecret"]),
    "environment": ("the value of a variable: environ-5ecret", ["environ-5ecret"]),
    "notes": ("eyJhbGciOiJI.eyJzdWIi5ecret.abc-5ecret", ["abc-5ecret", "5ecret.abc"]),
}
ENVIRONMENT = {"AWS_SECRET_ACCESS_KEY": "environ-5ecret"}
CALLBACK, LOGGED = "callback-5ecret", "logged-5ecret"
SECRETS = sorted({secret for _, secrets in FIELDS.values() for secret in secrets} | {CALLBACK, LOGGED})


@dataclass
class Arguments(NanotronTrainingArguments):
    """A user's class, with fields of its own and the `__repr__` that `@dataclass` writes."""

    push_to_hub_token: str | None = None
    wandb_api_key: str | None = None
    trackio_key: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)
    deep: Any = None
    copies: str = ""
    environment: str = ""
    notes: str = ""


def set_fields(args: Any) -> Any:
    """Fields that a run would act on are set when it has been made."""
    for name, (value, _) in FIELDS.items():
        setattr(args, name, copy.deepcopy(value))
    return args


def contents(data: bytes) -> bytes:
    """The bytes of a file, and those of its members if it is a zip archive."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return b"".join([data, *(archive.read(name) for name in archive.namelist())])


def found(data: bytes | str) -> list[str]:
    text = contents(data if isinstance(data, bytes) else data.encode())
    return [secret for secret in SECRETS if secret.encode() in text]


# ---- arguments ----


def written_forms(args: Any) -> dict[str, bytes | str]:
    saved = io.BytesIO()
    torch.save(args, saved)
    return {
        "torch.save": saved.getvalue(),
        "torch.save of a dict": pickled({"args": [args]}),
        "pickle": pickle.dumps(args),
        "pickle of a copy": pickle.dumps(copy.copy(args)),
        "pickle of a deep copy": pickle.dumps(copy.deepcopy(args)),
        "pickle, protocol 0": pickle.dumps(args, 0),
        "str": str(args),
        "repr": repr(args),
        "to_dict": repr(args.to_dict()),
        "to_json_string": args.to_json_string(),
        "to_sanitized_dict": repr(args.to_sanitized_dict()),
    }


def pickled(value: Any) -> bytes:
    saved = io.BytesIO()
    torch.save(value, saved)
    return saved.getvalue()


def test_arguments_are_written_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(ENVIRONMENT.items())))
    args = set_fields(Arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    forms = written_forms(args)
    assert {name: found(form) for name, form in forms.items()} == dict.fromkeys(forms, [])

    loaded = torch.load(io.BytesIO(forms["torch.save"]), weights_only=False)
    assert type(loaded) is Arguments and loaded.output_dir == args.output_dir and loaded.device == args.device
    assert loaded.hub_token is None and loaded.push_to_hub_token is None and loaded.wandb_api_key is None
    assert loaded.remote_checkpoints == "sftp://***@host/run?sig=***"
    assert loaded.storage_options == {"key": None, "client_kwargs": {"aws_session_token": None, "region_name": "x"}}

    # in memory all is as it was, and in copies
    context.set_spawning_popen(object())
    try:
        spawned = pickle.loads(pickle.dumps(args))
    finally:
        context.set_spawning_popen(None)
    for each in (args, copy.copy(args), copy.deepcopy(args), spawned):
        assert {name: getattr(each, name) for name in FIELDS} == {name: value for name, (value, _) in FIELDS.items()}
    assert copy.deepcopy(args).storage_options["client_kwargs"] is not args.storage_options["client_kwargs"]
    assert "tp_size=1," in str(args) and "hub_token=<HUB_TOKEN>," in str(args)


def test_arguments_without_secrets_are_written_whole(tmp_path: Path) -> None:
    args = NanotronTrainingArguments(output_dir=str(tmp_path), use_cpu=True, remote_checkpoints="s3://bucket/run")
    loaded = pickle.loads(pickle.dumps(args))
    assert vars(loaded).keys() == vars(args).keys() and str(loaded) == str(args)
    assert loaded.to_dict() == args.to_dict() and loaded.remote_checkpoints == "s3://bucket/run"


# ---- a run ----


def test_a_run_writes_no_secret(tmp_path: Path) -> None:
    """Every byte of checkpoints, a saved model, conversions, the Hub and the output, of a run that pushes."""
    with HubServer(token=HUB_TOKEN) as hub:
        environment = {**os.environ, **hub.client_env(tmp_path / "home"), **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        del environment["HF_TOKEN"]
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
        command = [sys.executable, __file__, str(tmp_path / "out")]
        worker = subprocess.run(command, env=environment, capture_output=True, timeout=600)
        output = worker.stdout + worker.stderr
        assert worker.returncode == 0, output.decode()[-5000:]
        commits = hub.commits("user/secretless")
        assert commits[-1].title == "End of training"  # the token was there to the end
        pushed = {f"{c.title}: {path}": file.data for c in commits for path, file in c.files.items()}
    files = {str(path): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert {"training_args.bin", "mine.bin", "trainer_state.json", "README.md", "monitor.json", "index.json"} <= names
    assert {"checkpoint-2", "saved", "converted", "nanotron"} <= names and any("training_args" in p for p in pushed)
    everything = {"the output": output, **files, **pushed}
    assert {name: found(data) for name, data in everything.items() if found(data)} == {}


class WithKey(TrainerCallback, ExportableState):
    """A callback whose state holds a key; it notes what the integrations write of a run."""

    def __init__(self, api_key: str = CALLBACK) -> None:
        self.api_key = api_key

    def state(self) -> dict[str, Any]:
        return {"args": {"api_key": self.api_key}, "attributes": {"url": f"https://me:{self.api_key}@host"}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forms = {"str": str(args), "repr": repr(args), "json": args.to_json_string(), "flat": args.to_sanitized_dict()}
        Path(args.output_dir, "monitor.json").write_text(json.dumps(forms))
        print(args, repr(args))


def run(out: str) -> None:
    from tiny import pad_batch, random_dataset, tiny_config, training_arguments

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer

    class OwnTrainer(NanotronTrainer):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            torch.save(self.args, Path(output_dir or self.args.output_dir, "mine.bin"))

    settings = {"output_dir": out, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    settings |= {"push_to_hub": True, "hub_model_id": "user/secretless", "hub_strategy": "all_checkpoints"}
    settings |= {"hub_always_push": True, "log_level": "debug", "hub_token": HUB_TOKEN}
    args = Arguments(**training_arguments(**settings))
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2), parallel=args.parallel)
    data = random_dataset(8)
    trainer = OwnTrainer(model=model, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[WithKey()])
    set_fields(args)
    trainer.log({"note": f"password={LOGGED}"})  # type: ignore[dict-item]
    trainer.train()
    trainer.save_model(f"{out}/saved")
    trainer.save_state()
    trainer.push_to_hub()
    main(["convert", "sharded-to-hub", f"{out}/checkpoint-2", f"{out}/converted"])
    main(["convert", "hub-to-nanotron", f"{out}/converted", f"{out}/nanotron"])


# ---- what the command line and the arguments complain about ----

PLAIN = "pa55w0rd-5ecret"  # of no known shape: only what it belongs to tells

# Text of a YAML file, and overrides.
COMPLAINTS: dict[str, tuple[str, list[str]]] = {
    "a list": (f"training: {{hub_token: [{PLAIN}]}}", []),
    "a mapping": (f"training: {{hub_token: {{a: {PLAIN}}}}}", []),
    "an override that is a list": ("training: {}", ["--hub_token", f"[{PLAIN}]"]),
    "an override that is no YAML": ("training: {}", ["--hub_token", f"[{PLAIN}"]),
    "an override with = that is no YAML": ("training: {}", [f"--hub_token=[{PLAIN}"]),
    "an override without dashes": ("training: {}", [HF]),
    "an override of a part": (f"training: {{hub_token: {PLAIN}}}", ["--training.hub_token.x", "1"]),
    "an override with an unknown key": ("training: {}", ["--hub_tokn", PLAIN]),
    "an override without a key": ("training: {}", [f"--={HF}"]),
    "a quote that does not end": (f'training:\n  hub_token: "{PLAIN}\n', []),
    "a bracket that does not end": (f"training:\n  hub_token: [{PLAIN}\n", []),
    "an alias": (f"training:\n  hub_token: *{PLAIN}\n", []),
    "a tag": (f"training:\n  hub_token: !{PLAIN}\n", []),
    "a tab": (f"training:\n\thub_token: {PLAIN}\n", []),
    "a colon": (f"training:\n  hub_token: {PLAIN}: x\n", []),
    "a list of sections": (f"training: [{{hub_token: {PLAIN}}}]", []),
    "text for a section": (f"training: hub_token={PLAIN}", []),
    "a URL": (f"training: {{remote_checkpoints: ['sftp://me:{PLAIN}@host/x']}}", []),
    "a URL of no known protocol": (f"training: {{remote_checkpoints: 'no://me:{PLAIN}@host/x', output_dir: x}}", []),
    "a refused mapping": (f"training: {{output_dir: x, use_cpu: true, fsdp_config: {{api_key: {PLAIN}}}}}", []),
    "refused JSON": (
        f'training: {{output_dir: x, use_cpu: true, accelerator_config: \'{{"api_key": "{PLAIN}"\'}}',
        [],
    ),
    "a token in a wrong field": (f"training: {{output_dir: x, use_cpu: true, report_to: {HF}}}", []),
    "a model that is not there": (f"model: {{name_or_path: /no/such/{HF}}}", []),
}


@pytest.mark.parametrize("traces", [False, True])
def test_complaints_hold_no_secret(traces: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed as one line, and raised, as a script or `--traceback` shows it."""
    path = tmp_path / "run.yaml"
    leaks: dict[str, str] = {}
    for name, (text, overrides) in COMPLAINTS.items():
        path.write_text(f"{text}\n")
        with pytest.raises((SystemExit, Exception)) as caught:
            main([*(["--traceback"] if traces else []), "train", str(path), *overrides])
        said = "".join(capsys.readouterr())
        if traces:
            assert not isinstance(caught.value, SystemExit), name
            said = "".join(traceback.format_exception(caught.value))
        assert len(said) > 30, name
        if any(secret in said for secret in (PLAIN, HF)):
            leaks[name] = said
    assert leaks == {}


def test_options_that_are_none_hold_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["convert", "sharded-to-hub", "a", "b", "--hub-token", PLAIN],
        ["convert", "sharded-to-hub", "a", "b", f"--hub-token={PLAIN}"],
        ["generate", "m", "--prompt", "a", "--seed", HF],
        [f"https://me:{PLAIN}@host"],
    ):
        with pytest.raises(SystemExit):
            main(command)
        said = "".join(capsys.readouterr())
        assert "error:" in said and PLAIN not in said and HF not in said, said


def test_arguments_complain_without_secrets(tmp_path: Path) -> None:
    for wrong in (
        {"hub_token": [PLAIN]},
        {"hub_token": {"a": PLAIN}},
        {"remote_checkpoints": [f"s3://key:{PLAIN}@bucket"]},
        {"deepspeed": {"secret": PLAIN}},
        {"fsdp_config": {"storage_options": {"key": PLAIN}}},
        {"accelerator_config": {"api_key": PLAIN}},
        {"label_names": [HF]},
        {"optim_args": f"password={PLAIN}"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
            NanotronTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)  # type: ignore[arg-type]
        said = "".join(traceback.format_exception(caught.value))
        assert PLAIN not in said and HF not in said, said


if __name__ == "__main__":
    run(sys.argv[1])
