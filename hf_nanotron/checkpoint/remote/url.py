"""What a URL for checkpoints says: the protocol, the path in the store, the host, and what in it is a secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import fsspec

from ...redaction import credentials_in, printable_url, secrets_of


@dataclass(frozen=True)
class Protocol:
    """How fsspec reaches a store."""

    package: str | None = None  # that fsspec needs for it, None if fsspec alone will do
    install: str = ""  # for pip
    # what comes after `//`: "bucket", a "server", a server that may be left out ("default"), or "none"
    host: str = "bucket"
    transfers: int | None = None  # that one connection can take at a time; None for as many as one likes


S3 = Protocol("s3fs", "hf-nanotron[remote]")
GCS = Protocol("gcsfs", "hf-nanotron[gcs]")
AZURE = Protocol("adlfs", "adlfs")
SFTP = Protocol("paramiko", "paramiko", "server")
FILE = Protocol(host="none")

PROTOCOLS = {
    "s3": S3,
    "s3a": S3,
    "gs": GCS,
    "gcs": GCS,
    "az": AZURE,
    "abfs": AZURE,
    "hdfs": Protocol("pyarrow", "pyarrow", "default"),
    "webhdfs": Protocol("requests", "requests", "server"),
    "sftp": SFTP,
    "ssh": SFTP,
    "smb": Protocol("smbprotocol", "smbprotocol", "server"),
    "ftp": Protocol(host="server", transfers=1),
    "file": FILE,
    "local": FILE,
    "memory": Protocol(host="folder"),
}
WORKS = ", ".join(PROTOCOLS)


def credentials(url: str, options: dict[str, Any] | None = None) -> set[str]:
    """The texts that must not be printed: of the URL what `printable_url` hides, of the options what is a secret."""
    return {*credentials_in(url), *secrets_of(options or {}, least=1)}


@dataclass(frozen=True)
class Place:
    """A folder of a store: its file system's class, that class's options from the URL, and the path within it."""

    protocol: str
    filesystem: Any
    root: str
    options: dict[str, Any] = field(repr=False)  # which may hold passwords


def parse(url: str) -> Place:
    said = f"remote_checkpoints={printable_url(url)!r}"
    protocol, separator, rest = url.partition("://")
    if not separator or not rest.strip("/"):
        raise ValueError(f"{said} is not a URL with a bucket or folder, such as s3://bucket/run.")
    if (known := PROTOCOLS.get(protocol)) is None:
        raise ValueError(f"{said}: unsupported protocol {protocol!r}; use one of {WORKS}.")
    host, _, path = rest.partition("/")
    if "?" in rest or "#" in rest:
        raise ValueError(f"{said} must not contain a query or a fragment (? or #).")
    if known.host == "none" and host:
        raise ValueError(f"{said}: a local path needs a third slash, as in {protocol}:///{'/'.join((host, path))}.")
    if known.host in ("bucket", "server") and not host:
        raise ValueError(f"{said} does not name a {known.host}; write it like {protocol}://{known.host}/run.")
    if known.host in ("server", "default") and not path.strip("/"):
        raise ValueError(f"{said} does not name a folder; write it like {protocol}://server/run.")
    if known.host in ("bucket", "folder", "none") and known is not AZURE and printable_url(url) != url:
        raise ValueError(
            f"{said}: {known.package or 'fsspec'} does not accept a user or password in the URL; put them where the "
            "package looks for them (for S3 the environment, ~/.aws or a role)."
        )
    try:
        filesystem = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        needs, install = known.package or "a package", known.install
        raise ImportError(f"{said} needs {needs}: pip install {_quoted(install) or error}.") from error
    try:
        options, root = filesystem._get_kwargs_from_urls(url.rstrip("/")), filesystem._strip_protocol(url.rstrip("/"))
    except ValueError:  # whose text may be a part of a password
        raise ValueError(
            f"{said}: cannot separate user, password, host and port; the port must be a number, and / ? # [ ] @ : in a "
            "password must be percent-encoded (%2F and so on)."
        ) from None
    for name in ("username", "user", "password"):
        if options.get(name):
            options[name] = unquote(options[name])
    if protocol in ("file", "local"):
        options["auto_mkdir"] = True
    return Place(protocol, filesystem, root.rstrip("/"), options)


def _quoted(package: str) -> str:
    return f"'{package}'" if "[" in package else package
