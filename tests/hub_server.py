"""A small Hub on loopback, in memory: what huggingface_hub's client asks of the real one, without Xet.

The client must run with HF_HUB_DISABLE_XET=1. Large files are kept as Git LFS does; their downloads are redirected to
another origin, as to a CDN. Faults can be asked for with `Hub.fail`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SIZE = 10_000_000  # bytes; larger files are large whatever they are


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    """Content of a file, and whether it is a large one."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Id in git: of the content, or of the pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass
class Repository:
    """Commits by their ids, each with all of its files; branches and tags."""

    kind: str
    name: str
    private: bool
    sdk: str | None = None
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), self.name, tree]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or an id means."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.resolve(revision)]


class Hub:
    """The server; `with Hub() as hub` runs it.

    `tokens` maps tokens to users. `requests` lists all requests as "METHOD path". `fail[pattern] = (status, when)` makes
    requests that match the pattern fail, "before" or "after" they had their effect.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_user": "user", "hf_other": "other"}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.leaks: list[str] = []  # requests to the CDN that carried a token
        self.fail: dict[str, tuple[int, str]] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def writes(self) -> list[str]:
        """Requests that could have changed something."""
        return [request for request in self.requests if request.split()[0] not in ("GET", "HEAD")]

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def find(self, kind: str, name: str, user: str | None, write: bool = False) -> Repository:
        """A repository that the user may see or change; to others a private one does not exist."""
        owner = name.split("/")[0]
        found = self.repositories.get((kind, name))
        if found is None or (found.private and user != owner):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise Refused(401, "", "Invalid username or password.")
        if write and user != owner:
            raise Refused(403, "", f"you must have write access to {name}")
        return found


class Handler(BaseHTTPRequestHandler):
    """One request: the routes below, in order."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        else:
            self.body = self.rfile.read(size)
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for pattern, fault in self.hub.fail.items() if re.search(pattern, request)), None)
            try:
                if fault and fault[1] == "before":
                    raise Refused(fault[0], "", "asked to fail")
                status, headers, body = self.route(path)
                if fault:
                    raise Refused(fault[0], "", "asked to fail")
            except Refused as error:
                body = json.dumps({"error": str(error)}).encode()
                headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                status = error.status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def user(self) -> str | None:
        """Whose token the request has; None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def reply(self, content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {}, json.dumps(content).encode()

    def route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, handle in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                return handle(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refused(404, "", f"no such endpoint: {self.command} {path}")

    def open(self, kinds: str, name: str, write: bool = False) -> Repository:
        return self.hub.find(kinds.strip("/").removesuffix("s") or "model", name, self.user, write)

    # Accounts and repositories

    def whoami(self) -> Any:
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        return self.reply({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> Any:
        wanted, user = json.loads(self.body), self.user
        owner, kind = wanted.get("organization") or user, wanted.get("type") or "model"
        if user is None or user != owner:
            raise Refused(401 if user is None else 403, "", f"you may not create a repository of {owner}")
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'spaces/' if kind == 'space' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.reply({"error": "You already created this repo", "url": url}, 409)
        made = Repository(kind, name, wanted.get("visibility") == "private", wanted.get("sdk"))
        made.commit("main", {".gitattributes": Blob(GIT_ATTRIBUTES, False)})
        self.hub.repositories[kind, name] = made
        return self.reply({"url": url, "name": name})

    def delete(self) -> Any:
        wanted = json.loads(self.body)
        found = self.open(wanted.get("type") or "model", f"{wanted['organization']}/{wanted['name']}", write=True)
        del self.hub.repositories[found.kind, found.name]
        return self.reply({})

    def info(self, kinds: str, name: str, revision: str = "") -> Any:
        found = self.open(kinds, name)
        sha = found.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        return self.reply({"id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, kinds: str, name: str, revision: str, folder: str = "") -> Any:
        files = self.open(kinds, name).files(revision)
        inside = [blob.describe(path) for path, blob in files.items() if path.startswith(folder and f"{folder}/")]
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        return self.reply(inside)

    def refs(self, kinds: str, name: str) -> Any:
        found = self.open(kinds, name)
        named = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        return self.reply(
            {"converts": []}
            | {
                key: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]
                for key, (folder, refs) in named.items()
            }
        )

    def tag(self, kinds: str, name: str, revision: str) -> Any:
        found, tag = self.open(kinds, name, write=True), json.loads(self.body)["tag"]
        if tag in found.tags:
            raise Refused(409, "", f"Tag {tag} exists already")
        found.tags[tag] = found.resolve(revision)
        return self.reply({})

    def branch(self, kinds: str, name: str, revision: str) -> Any:
        found = self.open(kinds, name, write=True)
        if revision in found.branches:
            raise Refused(409, "", f"Branch {revision} exists already")
        found.branches[revision] = found.resolve("main")
        return self.reply({})

    # Uploads

    def validate_yaml(self) -> Any:
        content = json.loads(self.body)["content"]
        known = content.startswith("---\n")
        return self.reply({"errors": [], "warnings": [] if known else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, kinds: str, name: str, revision: str) -> Any:
        files, answers = self.open(kinds, name, write=True).files(revision), []
        for wanted in json.loads(self.body)["files"]:
            path, sample = wanted["path"], base64.b64decode(wanted["sample"])
            large = path.endswith(".safetensors") or wanted["size"] > LFS_SIZE or b"\0" in sample
            blob = files.get(path)
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(entry | ({"oid": blob.etag} if blob else {}))
        return self.reply({"files": answers})

    def batch(self, kinds: str, name: str) -> Any:
        self.open(kinds, name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store:
                upload = {"href": f"{self.hub.cdn}/lfs/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(entry)
        return self.reply({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "the content does not have this hash")
        self.hub.store[oid] = self.body
        return self.reply({})

    def verify(self) -> Any:
        wanted = json.loads(self.body)
        if len(self.hub.store.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "", "no such object of that size")
        return self.reply({})

    def commit(self, kinds: str, name: str, revision: str) -> Any:
        found = self.open(kinds, name, write=True)
        if revision not in found.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(found.files(revision))
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header" and value.get("parentCommit", found.branches[revision]) != found.branches[revision]:
                raise Refused(412, "", "The expected parent commit is not the head of the branch")
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.store[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        return self.reply({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # Downloads

    def resolve(self, kinds: str, name: str, revision: str, file: str) -> Any:
        found = self.open(kinds, name)
        sha = found.resolve(revision)
        blob = found.commits[sha].get(file)
        if blob is None:
            raise Refused(404, "EntryNotFound", f"Entry not found: {file}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if not blob.lfs:
            return 200, headers, blob.data
        linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return 302, headers | linked | {"Location": f"{self.hub.cdn}/lfs/{blob.sha256}"}, b""

    def download(self, oid: str) -> Any:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)
        return 200, {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}, self.hub.store[oid]


KINDS, NAME = "(?P<kinds>models|spaces)", "(?P<name>[^/]+/[^/]+)"
REPOSITORY, REVISION = f"/api/{KINDS}/{NAME}", "(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"{REPOSITORY}(/revision/{REVISION})?", Handler.info),
    ("GET", f"{REPOSITORY}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("GET", f"{REPOSITORY}/refs", Handler.refs),
    ("POST", f"{REPOSITORY}/tag/{REVISION}", Handler.tag),
    ("POST", f"{REPOSITORY}/branch/{REVISION}", Handler.branch),
    ("POST", f"{REPOSITORY}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{REPOSITORY}/commit/{REVISION}", Handler.commit),
    ("POST", f"/(?P<kinds>spaces/)?{NAME}[.]git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.download),
    ("POST", "/verify", Handler.verify),
    ("GET|HEAD", f"/(?P<kinds>spaces/)?{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
)
