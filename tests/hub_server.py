"""A small Hugging Face Hub on loopback: the real ``huggingface_hub`` client pushes to it and pulls from it.

It speaks the parts of the Hub's HTTP protocol that ``create_repo``, ``create_commit`` (and ``upload_file``,
``upload_folder``), Git-LFS uploads, listings, branches, ``hf_hub_download`` and ``snapshot_download`` use, for model
repositories. State lives in memory, so a test can look at what was pushed, commit by commit::

    with HubServer(token="hf_secret") as hub:
        subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.client_env(tmp_path)}, timeout=600)
        assert [commit.title for commit in hub.commits("user/model")] == ["initial commit", "Upload model"]
        weights = hub.files("user/model")["model.safetensors"].data

The client reads ``HF_ENDPOINT`` once, when it is imported, so it has to run in a process started with ``client_env``.
Xet storage is switched off there: the client then uploads large files with Git-LFS, which this server checks
byte for byte. Not here: datasets and spaces, pull requests, tags, multi-part uploads, pagination.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.onnx", "*.parquet", "*.arrow")
LFS_SIZE = 10 * 2**20  # the Hub stores larger files with LFS, whatever their name
MAX_BODY = 256 * 2**20  # state is kept in memory: refuse what no test should send
SOCKET_TIMEOUT = 30.0  # seconds that one read or write may take before the connection is dropped


@dataclass(frozen=True)
class HubFile:
    """One file of a commit: its content, and whether it was pushed through LFS."""

    data: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        """The content's id for the client: sha256 of an LFS file, git object id of a regular one."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else _git_blob_id(self.data)

    def describe(self, path: str) -> dict[str, Any]:
        """The file's entry in a tree listing; git sees a pointer in place of an LFS file."""
        entry = {"type": "file", "path": path, "oid": self.etag, "size": len(self.data)}
        if self.lfs:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.data)}\n"
            entry["oid"] = _git_blob_id(text.encode())
            entry["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": len(text)}
        return entry


@dataclass(frozen=True)
class Commit:
    """One commit: its id, its parent's, its message, the whole tree after it, and the paths that it touched."""

    oid: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, HubFile]
    changed: frozenset[str]


@dataclass
class Repo:
    """One repository: its commits by id, and the head of each branch."""

    private: bool
    log: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit that a branch or a commit id names."""
        commit = self.log.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit

    def append(self, branch: str, title: str, description: str, files: Mapping[str, HubFile]) -> str:
        """Commit ``files`` as the new tree of ``branch``; returns the commit's id."""
        parent = self.branches.get(branch)
        old = self.log[parent].files if parent else {}
        changed = frozenset(path for path in old.keys() | files.keys() if old.get(path) != files.get(path))
        seed = repr((len(self.log), parent, title, sorted((path, file.etag) for path, file in files.items())))
        oid = self.branches[branch] = hashlib.sha1(seed.encode()).hexdigest()
        self.log[oid] = Commit(oid, parent, title, description, MappingProxyType(dict(files)), changed)
        return oid


class HubError(Exception):
    """An answer other than success; ``code`` is the Hub's own name of the reason, from which the client raises."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": " ".join(message.split()), "X-Error-Code": code}


class HubServer:
    """The server as a context manager: listening on 127.0.0.1 from entry to exit, on a port of the system's choice.

    Args:
        user: the account that every accepted token belongs to.
        token: the only token accepted; any other is answered 401, and without one only public repositories can be
            read. With ``None`` everything is allowed to everyone.
    """

    def __init__(self, user: str = "user", token: str | None = None) -> None:
        self.user, self.token = user, token
        self.requests: list[tuple[str, str, int]] = []  # method, path and status of every answer, in order
        self.errors: list[str] = []  # tracebacks of failures of the server itself; the context's exit raises them
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by sha256, what was uploaded through LFS
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._http.daemon_threads = False  # closing then joins the threads of open connections
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="hub-server", daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        if self.errors and error is None:
            raise RuntimeError("the Hub server failed on a request:\n" + "\n".join(self.errors))

    def client_env(self, home: Path | str) -> dict[str, str]:
        """Environment variables that point a client at this server, with its cache and stored tokens under ``home``."""
        where = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token or "hf_anything"}
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        off = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return {**where, **direct, **dict.fromkeys(off, "1")}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to ``revision``, oldest first; the first is the Hub's own "initial commit"."""
        with self.lock:
            repo = self.repos[repo_id]
            commits = [repo.find(revision)]
            while (parent := commits[-1].parent) is not None:
                commits.append(repo.log[parent])
            return commits[::-1]

    def files(self, repo_id: str, revision: str = "main") -> Mapping[str, HubFile]:
        """The files at a branch or commit, by path."""
        return self.commits(repo_id, revision)[-1].files


Route = Callable[["_Handler"], None]
ROUTES: list[tuple[str, re.Pattern[str], bool, Route]] = []


def route(methods: str, pattern: str, token: bool = False) -> Callable[[Route], Route]:
    """Register a handler for a path (``API`` and ``REPO`` stand for a repository's) that needs a token or does not."""
    pattern = pattern.replace("API", "/api/modelsREPO").replace("REPO", "/(?P<repo>[^/]+/[^/]+)")
    pattern = pattern.replace("<revision>", "(?P<revision>[^/]+)").replace("<path>", "(?P<path>.+)")

    def register(function: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), token, function) for method in methods.split("|"))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; ``self.args`` holds the parts of the path that the route's pattern names."""

    timeout = SOCKET_TIMEOUT

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)  # handles the request, too

    def answer(self) -> None:
        """Find the route, run it, and turn its exceptions into error answers."""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            size = int(self.headers.get("Content-Length", 0))
            if size > MAX_BODY or "Transfer-Encoding" in self.headers:
                raise HubError(413, f"bodies of a known length, at most {MAX_BODY} bytes, please")
            self.body = self.rfile.read(size)
            routes = [
                (token, run, match)
                for method, pattern, token, run in ROUTES
                if method == self.command and (match := pattern.fullmatch(url.path))
            ]
            if not routes:
                raise HubError(404, f"{self.command} {url.path} is not served by this test server")
            token, run, match = routes[0]  # the patterns exclude each other
            self.args = {name: unquote(value) for name, value in match.groupdict().items() if value}
            credentials = self.headers.get("Authorization")
            self.trusted = self.hub.token is None or credentials == f"Bearer {self.hub.token}"
            if not self.trusted and (token or credentials):
                raise HubError(401, "Invalid credentials in Authorization header")
            with self.hub.lock:  # one request at a time, so that commits are atomic
                run(self)
        except HubError as error:
            self.reply(error.body, status=error.status, headers=error.headers)
        except OSError:
            pass  # the connection broke: nobody is left to answer
        except Exception:
            self.hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            self.reply({"error": "internal error"}, status=501)  # unlike 500, the client does not try this one again

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, body: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Send bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        kind = "application/octet-stream" if data is body else "application/json"
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean; ``HubServer.requests`` has the log."""

    def repo(self) -> Repo:
        """The repository that the path names; a private one does not exist for strangers."""
        repo = self.hub.repos.get(self.args["repo"])
        if repo is None or (repo.private and not self.trusted):
            raise HubError(404 if self.trusted else 401, "Repository not found", code="RepoNotFound")
        return repo

    @route("GET", "/api/whoami-v2", token=True)
    def whoami(self) -> None:
        self.reply({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            card = _card_data(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        self.reply({"warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]})

    @route("POST", "/api/repos/create", token=True)
    def create_repo(self) -> None:
        ask = json.loads(self.body)
        name = f"{ask['organization'] or self.hub.user}/{ask['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        repo = self.hub.repos[name] = Repo(private=ask.get("visibility") == "private")
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.append("main", "initial commit", "", {".gitattributes": HubFile(rules.encode())})
        self.reply({"url": url, "name": name, "private": repo.private})

    @route("GET", "API(/revision/<revision>)?")
    def model_info(self) -> None:
        commit = self.repo().find(self.args.get("revision", "main"))
        card = _card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        info = {"id": self.args["repo"], "sha": commit.oid, "private": self.repo().private}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply({**info, "tags": card.get("tags", []), "cardData": card, "siblings": siblings})

    @route("POST", "API/branch/(?P<branch>[^/]+)", token=True)
    def create_branch(self) -> None:
        repo, branch = self.repo(), self.args["branch"]
        if branch in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[branch] = repo.find(json.loads(self.body).get("startingPoint", "main")).oid
        self.reply({})

    @route("GET", "API/tree/<revision>(/<path>)?")
    def list_tree(self) -> None:
        files = self.repo().find(self.args["revision"]).files
        root = self.args["path"].rstrip("/") + "/" if "path" in self.args else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in files if path.startswith(root)):
            parts = path[len(root) :].split("/")
            for depth in range(1, len(parts)):
                folder = root + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": _git_blob_id(folder.encode()), "size": 0}
            entries[path] = files[path].describe(path)
        if root and not entries:
            raise HubError(404, f"{root} does not exist", code="EntryNotFound")
        everything = self.query.get("recursive") == "true"
        self.reply([entry for path, entry in entries.items() if everything or "/" not in path[len(root) :]])

    @route("GET|HEAD", "REPO/resolve/<revision>/<path>")
    def resolve(self) -> None:
        """One file, or the range of it that was asked for."""
        commit = self.repo().find(self.args["revision"])
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(self.args["path"])
        if file is None:
            missing = HubError(404, "Entry not found", code="EntryNotFound")
            missing.headers |= headers  # with the commit's id the client can remember that the file does not exist
            raise missing
        size = len(file.data)
        headers["ETag"] = f'"{file.etag}"'
        if file.lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.command == "HEAD":
            return self.reply(file.data, headers=headers)
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last or 0), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return self.reply(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
        self.reply(file.data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    @route("POST", "API/preupload/<revision>", token=True)
    def preupload(self) -> None:
        """Say for every file whether it goes through LFS, and which content it has here already."""
        there = self.repo().find(self.args["revision"]).files
        answers = []
        for ask in json.loads(self.body)["files"]:
            path = ask["path"]
            lfs = ask["size"] > LFS_SIZE or any(fnmatch(Path(path).name, pattern) for pattern in LFS_PATTERNS)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": there[path].etag if path in there else None})
        self.reply({"files": answers})

    @route("POST", r"REPO\.git/info/lfs/objects/batch", token=True)
    def lfs_batch(self) -> None:
        """Hand out an upload address for every LFS object that is not here yet."""
        self.repo()  # must exist
        objects = [{"oid": ask["oid"], "size": ask["size"]} for ask in json.loads(self.body)["objects"]]
        for ask in objects:
            if ask["oid"] not in self.hub.objects:
                ask["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{ask['oid']}?size={ask['size']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self) -> None:
        """Store an object if it is the announced one. As at a storage provider, the address itself is the permit."""
        oid, size = self.args["oid"], int(self.query["size"])
        if len(self.body) != size or hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"announced were {size} bytes with sha256 {oid}, these {len(self.body)} are others")
        self.hub.objects[oid] = self.body
        self.reply(b"")

    @route("POST", "API/commit/<revision>", token=True)
    def create_commit(self) -> None:
        """Apply a commit: one JSON object a line, first the header, then the operations."""
        repo, branch = self.repo(), self.args["revision"]
        head = repo.find(branch)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if branch not in repo.branches or header["key"] != "header" or "create_pr" in self.query:
            raise HubError(400, "a commit goes to a branch (pull requests are not supported), its header comes first")
        message = header["value"]
        if message.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if key == "file":
                files[path] = HubFile(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise HubError(400, f"LFS object {value['oid']} of {value['size']} bytes was not uploaded")
                files[path] = HubFile(data, lfs=True)
            elif key == "deletedFile" and path in files:
                del files[path]
            elif key == "deletedFolder" and any(Path(name).is_relative_to(path) for name in files):
                files = {name: file for name, file in files.items() if not Path(name).is_relative_to(path)}
            else:
                raise HubError(404, f"{key}: A file with this name doesn't exist: {path}", code="EntryNotFound")
        oid = repo.append(branch, message["summary"], message["description"], files)
        self.reply({"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{self.args['repo']}/commit/{oid}"})


def _git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card_data(readme: str) -> dict[str, Any]:
    """The metadata block at the top of a model card."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", readme, re.DOTALL | re.MULTILINE)
    data = (yaml.safe_load(block[1]) if block else None) or {}
    if not isinstance(data, dict):
        raise yaml.YAMLError("the metadata of a card must be a mapping")
    return data
