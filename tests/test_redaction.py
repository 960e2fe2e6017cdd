"""What counts as a secret: names, URLs, messages and values of fields."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, fields

import pytest

from hf_nanotron.redaction import credentials_in, is_secret, printable, printable_url, redacted, secrets_of
from hf_nanotron.training_args import NanotronTrainingArguments

SECRET = "Pa55/w0rd"
TOKEN = "hf_" + "aB3" * 12

SECRET_NAMES = """
hub_token push_to_hub_token token hf_token HF_TOKEN auth_token accessToken session-token aws_session_token sas_token
key secret password passwd sftp_password db_password_prod client_secret secret_key aws_secret_access_key api_key API_KEY
apiKey X-Api-Key wandb_api_key account_key private_key ssh_key aws_access_key_id AWSAccessKeyId X-Amz-Signature
X-Amz-Credential X-Amz-Security-Token signature sig sas credentials connection_string Authorization cookie
training.hub_token --hub-token
""".split()
PLAIN_NAMES = """
eos_token pad_token bos_token image_token additional_special_tokens max_new_tokens include_num_input_tokens_seen
average_tokens_across_devices length_column_name sort_key num_key_value_heads signature_columns tokenizer keys_to_ignore
loss_per_token keys KeyError monkey passive secretary tokens key_value_dtype
""".split()

URLS = {
    "sftp://user:secret@host/run": "sftp://***@host/run",
    "sftp://user:secret@host:22/run": "sftp://***@host:22/run",
    "https://TOKEN@host/run": "https://***@host/run",
    "s3://KEY:SECRET@bucket/run": "s3://***@bucket/run",
    "s3://KEY:SEC/RET+=@bucket/run": "s3://***@bucket/run",
    "sftp://user:p@ss/w@rd@host/run": "sftp://***@host/run",
    "sftp://user:12/34@host/run": "sftp://***@host/run",
    "sftp://user:pass word'\"@host/run": "sftp://***@host/run",
    "sftp://user:se?cret@host/run": "sftp://***",
    "sftp://user:se#cret@host/run": "sftp://***",
    "sftp://user:p%40ss@host/run": "sftp://***@host/run",
    "sftp://:secret@host/run": "sftp://***@host/run",
    "simplecache::s3://KEY:SECRET@bucket": "simplecache::s3://***@bucket",
    "zip://a.zip::sftp://user:secret@host/run": "zip://a.zip::sftp://***@host/run",
    "sftp://user:a::b@host/run": "sftp://***@host/run",
    "https://host/run?X-Amz-Signature=abc&X-Amz-Credential=def": "https://host/run?X-Amz-Signature=***&X-Amz-Credential=***",
    "https://host:443/run?mail=a@b&sig=abc": "https://***",
    "abfs://c@account.dfs.core.windows.net/run?sv=1&sig=abc": "abfs://c@account.dfs.core.windows.net/run?sv=***&sig=***",
    "https://host/run#access_token=abc": "https://host/run#***",
    "s3://b/r?a=1&token=word;x": "s3://b/r?a=***&token=***&***",
    "me:word@host": "***@host",
    # and these have nothing to hide
    "sftp://me@host/run": "sftp://me@host/run",
    "abfs://container@account.dfs.core.windows.net/run": "abfs://container@account.dfs.core.windows.net/run",
    "s3://bucket/run": "s3://bucket/run",
    "s3://bucket/run@2": "s3://bucket/run@2",
    "hf://datasets/user/name@main/file": "hf://datasets/user/name@main/file",
    "http://127.0.0.1:9000/bucket": "http://127.0.0.1:9000/bucket",
    "http://[::1]:9000/bucket": "http://[::1]:9000/bucket",
    "https://host/page#part": "https://host/page#part",
    "file:///tmp/run": "file:///tmp/run",
    "memory://run": "memory://run",
    "/a/local/path": "/a/local/path",
    "user@host": "user@host",
}  # fmt: skip

MESSAGES = {
    f"cannot reach sftp://me:{SECRET}@host/run: timeout": "cannot reach sftp://***@host/run: timeout",
    f"GET https://host/x?sig={SECRET}, 403": "GET https://host/x?sig=*** 403",
    f"hub_token='{SECRET}' must be text": "hub_token='***' must be text",
    f"training.hub_token={SECRET} must be text": "training.hub_token=*** must be text",
    f"{{'key': '{SECRET}', 'secret': '{SECRET}'}}": "{'key': '***', 'secret': '***'}",
    f'{{"hub_token": "{SECRET}", "seed": 1}}': '{"hub_token": "***", "seed": 1}',
    f"hub_token: {SECRET}": "hub_token: ***",
    f"unrecognized arguments: --hub-token {SECRET}": "unrecognized arguments: --hub-token ***",
    f"unrecognized arguments: --hub-token={SECRET}": "unrecognized arguments: --hub-token=***",
    f"error: hub_token={SECRET}": "error: hub_token=***",
    f"not used: ['--hub_token', '{SECRET}']": "not used: ['--hub_token', '***']",
    f"--hub_token={SECRET} is not YAML": "--hub_token=*** is not YAML",
    f"the run {TOKEN} is not there": "the run *** is not there",
    f"Authorization: Bearer {SECRET}": "Authorization: ***",
    f"AWS_SECRET_ACCESS_KEY={SECRET}": "AWS_SECRET_ACCESS_KEY=***",
    "AccessDenied for AKIAIOSFODNN7EXAMPLE": "AccessDenied for ***",
    # and these have nothing to hide
    "unknown key: training.x": "unknown key: training.x",
    "write overrides as --key value.": "write overrides as --key value.",
    "hub_token=None, seed=1": "hub_token=None, seed=1",
    "eos_token='</s>'": "eos_token='</s>'",
    "KeyError: 'layers'": "KeyError: 'layers'",
    "hf_nanotron has no module hf_nanotron_something": "hf_nanotron has no module hf_nanotron_something",
}  # fmt: skip

Point = namedtuple("Point", "path seed")


@dataclass(frozen=True)
class Options:
    user: str
    password: str


def test_names_of_secrets() -> None:
    assert [name for name in SECRET_NAMES if not is_secret(name)] == []
    assert [name for name in PLAIN_NAMES if is_secret(name)] == []
    own = {entry.name for entry in fields(NanotronTrainingArguments) if is_secret(entry.name)}
    assert own == {entry.name for entry in fields(NanotronTrainingArguments) if entry.name.endswith("_token")}
    assert "hub_token" in own


@pytest.mark.parametrize(("table", "function"), [(URLS, printable_url), (MESSAGES, printable)])
def test_printable(table: dict[str, str], function) -> None:
    assert {text: function(text) for text in table} == table
    assert {text: function(text) for text in table.values()} == {text: text for text in table.values()}  # twice is once


def test_credentials_of_urls_are_known_in_other_texts() -> None:
    assert credentials_in("sftp://me:p%40ss@host/run") == ["me:p%40ss", "me:p@ss", "p%40ss", "p@ss"]
    assert credentials_in("https://TOKEN@host/run?sig=a%2Fb&x=1") == ["TOKEN", "a%2Fb", "a/b", "1"]
    assert credentials_in("s3://bucket/run") == []
    known = credentials_in("sftp://me:p%40ss@host/run")
    assert printable("authentication of me with p@ss failed", known) == "authentication of me with *** failed"
    values = {"hub_token": SECRET, "options": {"secret": "abcdef"}, "url": "sftp://me:ghijkl@h", "pin": {"token": "1"}}
    values |= {"token": None, "CREDENTIALS": "/a/folder", "name": "plain"}
    assert list(secrets_of(values)) == [SECRET, "abcdef", "me:ghijkl", "ghijkl"]


def test_values_of_fields() -> None:
    """Those that hold a secret become copies without; all others stay the same objects."""
    plain = {"steps": [1, 2.0], "name": "a run", "point": Point("a", 1), "token": None, "use_auth_token": True}
    assert redacted("options", plain) is plain and redacted("x", Options("me", "")) == Options("me", "")
    plain = {"key": "eval_loss", "keys": ["input_ids"], "more": {"key": 3}, "loss_token": 0.5, "eval_signature": 1.5}
    assert redacted("state", plain) is plain and redacted("key", "loss") == "loss"
    for name, value, right in (
        ("key", "AKIAXXXX", None),
        ("key", "minio-admin", None),
        ("key", 123456789012, None),
        ("hub_token", SECRET, None),
        ("hub_token", 12345, None),
        ("hub_token", [SECRET], None),
        ("hub_token", {"a": SECRET}, None),
        ("hub_token", "", ""),
        ("storage_options", {"key": SECRET, "more": {"region": "x"}}, {"key": None, "more": {"region": "x"}}),
        ("nested", [{"a": ({"password": SECRET},)}], [{"a": ({"password": None},)}]),
        ("point", Point(f"s3://k:{SECRET}@b", 1), Point("s3://***@b", 1)),
        ("names", {TOKEN}, {"***"}),
        ("data", SECRET.encode() + TOKEN.encode(), None),
        ("run_name", f"run {SECRET}", "run ***"),
        ("remote", f"sftp://me:{SECRET}'s own@host/run", "sftp://***@host/run"),
        ("options", Options("me", SECRET), Options("me", None)),  # type: ignore[arg-type]
    ):  # fmt: skip
        assert redacted(name, value, None, known=[SECRET]) == right, name
