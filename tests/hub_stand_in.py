"""A local stand-in of the hub: the part of its HTTP API that uploads and downloads of models use.

    with Hub() as hub:
        hub.add("alice/model", {"config.json": b"{}"})
        hub.fail("PUT", "/objects/", CUT)

Everything is kept in memory. It speaks Git LFS and not Xet, so its clients are told to leave Xet
alone (`environment`, `connect`). Users are alice, with a token to write and one to read, and bob.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

# token → user and role
TOKENS = {
    "hf_alice": ("alice", "write"),
    "hf_alice_reads": ("alice", "read"),
    "hf_bob": ("bob", "write"),
}
ORGANIZATIONS = {"alice": ["lab"], "bob": []}
CUT = 0  # a "status": the connection is closed in the middle of the request
DECLINED = "Invalid credentials in Authorization header"


@dataclass
class Repository:
    """Files as they are at the head, and what each commit changed."""

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Failure:
    """Requests of `method` whose path matches are answered with `status`, `times` times."""

    method: str
    path: str
    status: int
    code: str = ""
    message: str = ""
    times: int = 1 << 30


class Refusal(Exception):
    """An answer that is an error: its status, X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Hub:
    """Repositories, LFS objects by their sha256, and every request as "METHOD path"."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.hooks: list[Callable[[str], None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, name: str, files: Mapping[str, bytes] | Path,
        *, private: bool = False, gated: bool = False,
    ) -> Repository:  # fmt: skip
        """A repository with these files, or with those of a folder."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repository = self.repositories[name] = Repository(private, gated)
        repository.files |= files
        repository.commits.append(("add", sorted(files)))
        return repository

    def fail(self, method: str, path: str, status: int, **details: Any) -> None:
        self.failures.append(Failure(method, path, status, **details))

    def sent(self, pattern: str) -> list[str]:
        """The requests that were made, of those that match `pattern`."""
        return [request for request in self.requests if re.search(pattern, request)]


def environment(url: str, home: Path, token: str | None = "hf_alice") -> dict[str, str]:
    """The variables that send a program's hub traffic to `url` and its cache to `home`."""
    variables = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(home / "hub")}
    return variables if token is None else variables | {"HF_TOKEN": token}


def connect(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = "hf_alice"
) -> None:
    """Do in this process what `environment` does for another: the hub's constants are read once."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(path: str, data: bytes) -> str:
    """A file's identity on the hub: git's for a small file, LFS's for weights."""
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_sha1(data)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".gguf"))


class _Handler(BaseHTTPRequestHandler):
    """One request: `ROUTES` names the method that answers it."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body leave together: two writes cost a delayed acknowledgement

    def __init__(self, hub: Hub, *connection: Any):
        self.hub = hub
        super().__init__(*connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for hook in self.hub.hooks:
                hook(self.hub.requests[-1])
            failure = self.failure(path)
            if failure is not None and failure.status == CUT:
                return self.cut()
            body = self.body()
            if failure is not None:
                raise Refusal(failure.status, failure.code, failure.message)
            self.answer_route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.answer({"error": refusal.message}, refusal.status, headers)
        except ConnectionError:  # the client has gone
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer_route(self, path: str, body: bytes) -> None:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                return getattr(self, name)(body, **match.groupdict())
        raise Refusal(404, message=f"the stand-in has no {self.command} {path}")

    def body(self) -> bytes:
        if "Transfer-Encoding" not in self.headers:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def failure(self, path: str) -> Failure | None:
        """The first failure that was asked for this request."""
        for failure in self.hub.failures:
            if failure.method == self.command and failure.times and re.search(failure.path, path):
                failure.times -= 1
                return failure
        return None

    def cut(self) -> None:
        """Promise a body and stop in its middle."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"...")
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def answer(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who may do what.

    def user(self) -> tuple[str, str] | None:
        """The user and role of the request's token; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in TOKENS:
            raise Refusal(401, message=DECLINED)
        return TOKENS[token]

    def readable(self, name: str) -> Repository:
        user = self.user()
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and not owns(user, name)
        if repository is None or hidden:
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def require_write(self, name: str) -> None:
        user = self.user()
        if not owns(user, name) or user is None or user[1] != "write":
            raise Refusal(403, message=f"You have no permission to write to {name}")

    # Answers.

    def whoami(self, _: bytes) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, message="Invalid username or password.")
        name, role = user
        organizations = [{"name": org, "roleInOrg": "admin"} for org in ORGANIZATIONS[name]]
        access = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        self.answer({"type": "user", "name": name, "orgs": organizations, "auth": access})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self.user()
        name = f"{asked.get('organization') or (user and user[0])}/{asked['name']}"
        self.require_write(name)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.answer({"url": url, "name": name})

    def info(self, _: bytes, name: str, revision: str = "main") -> None:
        repository = self.readable(name)
        if revision not in ("main", repository.head):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in repository.files]
        known = {"id": name, "sha": repository.head, "private": repository.private}
        self.answer(known | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        entries = []
        for path, data in self.readable(name).files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if is_large(path):
                entry["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    def check_write(self, _: bytes, name: str) -> None:
        self.readable(name)
        self.require_write(name)
        self.answer({})

    def validate(self, body: bytes) -> None:
        starts = json.loads(body)["content"].startswith("---\n")
        errors = [] if starts else [{"message": "no metadata"}]
        self.answer({"errors": errors, "warnings": []}, 200 if starts else 400)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.require_write(name)
        there = self.readable(name).files
        self.answer({"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": etag(path, there[path]) if (path := file["path"]) in there else None,
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, body: bytes, name: str) -> None:
        self.require_write(name)
        objects = []
        for wanted in json.loads(body)["objects"]:
            target = f"{self.hub.url}/objects/{wanted['oid']}"
            actions = {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}
            there = wanted["oid"] in self.hub.objects
            objects.append(wanted if there else wanted | {"actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message="the content does not match its hash")
        self.hub.objects[oid] = body
        self.answer({})

    def verify(self, body: bytes, oid: str) -> None:
        if len(self.hub.objects[oid]) != json.loads(body)["size"]:
            raise Refusal(400, message="wrong size")
        self.answer({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        self.require_write(name)
        repository = self.readable(name)
        lines = [json.loads(line) for line in body.splitlines()]
        changed = []
        for line in lines[1:]:
            value = line["value"]
            changed.append(value["path"])
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del repository.files[value["path"]]
        repository.commits.append((lines[0]["value"]["summary"], sorted(changed)))
        url = f"{self.hub.url}/{name}/commit/{repository.head}"
        self.answer({"commitUrl": url, "commitOid": repository.head, "success": True})

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        if repository.gated and not owns(self.user(), name):
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted")
        if path not in repository.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = repository.files[path]
        headers = {"ETag": f'"{etag(path, data)}"', "X-Repo-Commit": repository.head}
        self.answer(data, headers=headers)


def owns(user: tuple[str, str] | None, name: str) -> bool:
    namespace = name.split("/")[0]
    return user is not None and namespace in (user[0], *ORGANIZATIONS[user[0]])


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("GET", f"/api/models/{NAME}", "info"),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", "info"),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", "tree"),
    ("GET", f"/api/models/{NAME}/auth-check/write", "check_write"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", "preupload"),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/objects/(?P<oid>[0-9a-f]+)", "put_object"),
    ("POST", "/objects/(?P<oid>[0-9a-f]+)/verify", "verify"),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", "commit"),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
)
