"""What URLs for checkpoints are read as, what of them is printed, and what errors of stores are called."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from hf_nanotron.checkpoint.remote.errors import (
    CLOCK,
    CREDENTIALS,
    FORBIDDEN,
    FULL,
    MISSING,
    NO_STORE,
    OUTAGE,
    PERMISSION,
    REGION,
    Kind,
    StoreError,
    kind_of,
)  # fmt: skip
from hf_nanotron.checkpoint.remote.retry import Backoff
from hf_nanotron.checkpoint.remote.store import RemoteStore
from hf_nanotron.checkpoint.remote.url import PROTOCOLS, credentials, parse
from hf_nanotron.redaction import printable_url


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What fsspec's classes import, so that those of servers can be looked at without the packages."""
    registry = sys.modules["fsspec.registry"]._registry  # type: ignore[attr-defined]
    for name in ("paramiko", "smbclient", "smbprotocol", "smbprotocol.exceptions"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    before = dict(registry)
    yield
    for name in registry.keys() - before.keys():
        del registry[name]
    for name in ("sftp", "smb"):
        sys.modules.pop(f"fsspec.implementations.{name}", None)


SERVERS = [
    ("hdfs://node:9000/run/a", "/run/a", {"host": "node", "port": 9000}),
    ("hdfs://me@node/run", "/run", {"host": "node", "user": "me"}),
    ("hdfs:///run", "/run", {}),
    ("webhdfs://node:9870/run/", "/run", {"host": "node", "port": 9870}),
    ("webhdfs://me@node:9870/run", "/run", {"host": "node", "port": 9870, "user": "me"}),
    ("sftp://me@host/run", "/run", {"host": "host", "username": "me"}),
    (
        "sftp://me:p%40s%2Fs@host:2222/run",
        "/run",
        {"host": "host", "port": 2222, "username": "me", "password": "p@s/s"},
    ),
    ("ssh://host/run", "/run", {"host": "host"}),
    ("ftp://me:word@host:2121/a/run", "/a/run", {"host": "host", "port": 2121, "username": "me", "password": "word"}),
    ("ftp://host/run", "/run", {"host": "host"}),
    ("smb://group;me:word@host/share/run", "/share/run", {"host": "host", "username": "group;me", "password": "word"}),
    ("file:///a/run", "/a/run", {"auto_mkdir": True}),
    ("memory://run", "/run", {}),
]


@pytest.mark.parametrize(("url", "root", "options"), SERVERS, ids=[url for url, *_ in SERVERS])
def test_hosts_users_and_paths(packages: None, url: str, root: str, options: dict[str, Any]) -> None:
    place = parse(url)
    assert (place.root, place.options) == (root, options)
    store = RemoteStore(url)
    assert store._options == options and store.root == root
    assert "word" not in store.url and "p%40" not in store.url


def test_buckets() -> None:
    pytest.importorskip("s3fs")
    for url in ("s3://bucket/run/", "s3a://bucket/run"):
        place = parse(url)
        assert (place.root, place.options) == ("bucket/run", {})


REFUSED = [
    ("http://host/run", "unsupported protocol 'http'; use one of s3, s3a, gs, "),
    ("https://user:word@host/run", r"remote_checkpoints='https://\*\*\*@host/run': no checkpoints"),
    ("github://org:repo@main/path", "protocol 'github'"),
    ("zip://a.zip", "protocol 'zip'"),
    ("simplecache::s3://bucket/run", "protocol 'simplecache::s3'"),
    ("sftp:///run", "does not name a server; write it like sftp://server/run"),
    ("webhdfs:///run", "does not name a server"),
    ("ftp://host", "does not name a folder"),
    ("ftp://host/", "does not name a folder"),
    ("hdfs://node:9000", "does not name a folder"),
    ("s3:///bucket/run", "does not name a bucket"),
    ("file://tmp/run", "a local path needs a third slash, as in file:///tmp/run"),
    ("s3://key:se/cret+word@bucket/run", r"'s3://\*\*\*@bucket/run': s3fs does not accept a user or password"),
    ("s3://key@bucket/run", r"'s3://\*\*\*@bucket/run': s3fs does not accept a user"),
    ("gs://me:word@bucket/run", "gcsfs does not accept a user or password"),
    ("s3://bucket/run?X-Amz-Signature=word", r"run\?X-Amz-Signature=\*\*\*' must not contain a query"),
    ("s3://bucket/run#1", "no fragment"),
    ("ftp://me:word@host:port/run", "the port is a number"),
    ("ftp://me:wo/rd@host/run", "the port is a number"),
    ("", "is not a URL"),
    ("/a/folder", "is not a URL"),
]


@pytest.mark.parametrize(("url", "said"), REFUSED, ids=[url for url, _ in REFUSED])
def test_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        RemoteStore(url)
    assert "word" not in "".join(traceback.format_exception(caught.value)).replace("password", "")


PRINTED = [
    ("s3://bucket/run", "s3://bucket/run"),
    ("s3://bucket/run@2", "s3://bucket/run@2"),
    ("sftp://me@host/run", "sftp://me@host/run"),
    ("sftp://me:word@host:22/run", "sftp://***@host:22/run"),
    ("sftp://me:w@o:r/d@host/run", "sftp://***@host/run"),
    ("sftp://:word@host/run", "sftp://***@host/run"),
    ("https://token@host/run", "https://***@host/run"),
    ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
    ("s3://b/r?a=1&token=word;x", "s3://b/r?a=***&token=***&***"),
    ("me:word@host", "***@host"),
]


@pytest.mark.parametrize(("url", "shown"), PRINTED, ids=[shown for _, shown in PRINTED])
def test_printed(url: str, shown: str) -> None:
    assert printable_url(url) == shown
    assert printable_url(shown) == shown
    for secret in credentials(url):
        assert secret not in shown


def test_no_password_in_a_message_or_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the URL, percent-encoded or not, and of the options, whatever the package says."""
    url, options = "ftp://me:p%40ssw0rd@host/run", {"secret": "opti0n", "config": {"sas_token": "deep0ne"}}
    store = RemoteStore(url, options, Backoff(0.01, start=0))

    def broken(**given: Any) -> None:
        raise OSError(f"cannot log in to {url} with {given}")

    store._class = broken
    for action in (store.check_writable, store.checkpoints, lambda: store.patiently("x", lambda: store.fs)):
        with pytest.raises(StoreError) as caught:
            action()
        text = "".join(traceback.format_exception(caught.value))
        assert "remote_checkpoints='ftp://***@host/run'" in text and "cannot log in to" in text
        assert not [secret for secret in ("p%40ssw0rd", "p@ssw0rd", "opti0n", "deep0ne") if secret in text]
    assert "ssw0rd" not in store.retry.last_error


# ---- what errors are called ----


class Coded(Exception):
    """An error as botocore's are."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def named(name: str, **fields: Any) -> Exception:
    """An instance of another package's class."""
    error: Exception = type(name, (Exception,), {})("said so")
    error.__dict__.update(fields)
    return error


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


KINDS: list[tuple[Exception, Kind]] = [
    *[
        (Coded(code), CREDENTIALS)
        for code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "400", "401")
    ],
    (because(OSError(errno.EINVAL, "Bad Request"), Coded("400")), CREDENTIALS),  # as s3fs says it
    (because(PermissionError("Forbidden"), Coded("403")), FORBIDDEN),
    (because(PermissionError("Access Denied"), Coded("AccessDenied")), PERMISSION),
    (because(FileNotFoundError("no bucket"), Coded("NoSuchBucket")), MISSING),
    (Coded("RequestTimeTooSkewed"), CLOCK),
    (Coded("PermanentRedirect"), REGION),
    *[(Coded(code), OUTAGE) for code in ("InternalError", "SlowDown", "ServiceUnavailable", "500", "RequestTimeout")],
    (named("NoCredentialsError"), CREDENTIALS),
    (named("RefreshError"), CREDENTIALS),
    (named("AuthenticationException"), CREDENTIALS),
    (named("HttpError", code=401), CREDENTIALS),  # gcsfs
    (named("HttpError", code=503), OUTAGE),
    (named("HTTPError", response=SimpleNamespace(status_code=403)), FORBIDDEN),  # requests
    (named("ContentLengthError", code=400), OUTAGE),  # aiohttp, of an answer that was cut off
    (named("error_perm"), OUTAGE),
    (Exception("530 Login incorrect."), CREDENTIALS),  # ftplib
    (NotImplementedError(), NO_STORE),
    (OSError("Unable to load libjvm: not found"), NO_STORE),
    (OSError(errno.ENOSPC, "No space left on device"), FULL),
    (PermissionError(errno.EACCES, "Permission denied"), PERMISSION),
    (ConnectionResetError(), OUTAGE),
    (TimeoutError(), OUTAGE),
    (OSError("whatever"), OUTAGE),
]


def test_errors_are_named() -> None:
    for error, kind in KINDS:
        assert kind_of(error) is kind, error
        assert kind_of(because(RuntimeError("wrapped"), error)) is kind, error
    assert all(kind.lasts and kind.says for _, kind in KINDS if kind is not OUTAGE)


def test_the_list_that_works_is_what_fsspec_knows() -> None:
    from fsspec.registry import known_implementations

    assert set(PROTOCOLS) <= set(known_implementations)
