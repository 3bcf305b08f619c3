"""A stand-in for the Hub: the part of its HTTP API that huggingface_hub 2.4 uses to push and to load."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, TOKEN = "me", "hf_" + "PlantedSecret" * 3
Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds and was asked for.

    Args:
        fail_at: A part of a path whose requests get ``status``.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_at: str | None = None
    status: int = 500

    def files(self, repo_id: str, branch: str = "main") -> Files:
        return self.repositories[repo_id].branches[branch]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code=code)

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fail_at and self.hub.fail_at in path:
            return self.answer({"error": "planned failure"}, self.hub.status)
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self.answer({"error": "bad token"}, 401)
        known = self.headers.get("Authorization") is not None
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                repo = self.hub.repositories.get(found.groupdict().get("repo", ""))
                needs = method is not Handler.create and "repo" in found.groupdict()
                if needs and (repo is None or (repo.private and not known)):
                    return self.missing("RepoNotFound")
                if self.command in ("POST", "PUT") and not known and method is not Handler.put_large:
                    return self.answer({"error": "no token"}, 401)
                return method(self, body, repo, **found.groupdict())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def create(self, body: bytes, _: object) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not repo_id.startswith(f"{OWNER}/"):
            return self.answer({"error": "not yours"}, 403)
        there = repo_id in self.hub.repositories
        if not there:
            self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if there else 200)

    def info(self, _: bytes, repo: Repository, /, **named: str) -> None:
        branch = named.get("revision") or "main"
        if branch not in repo.branches:
            return self.missing("RevisionNotFound")
        siblings = [{"rfilename": name} for name in repo.branches[branch]]
        found = {"id": named["repo"], "private": repo.private, "siblings": siblings, "sha": "0" * 40}
        return self.answer(found)

    def tree(self, _: bytes, repo: Repository, /, *, revision: str, **__: str) -> None:
        files = repo.branches["main" if revision == "0" * 40 else revision]
        self.answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )

    def branch(self, _: bytes, repo: Repository, /, *, branch: str, **__: str) -> None:
        repo.branches.setdefault(branch, {})
        self.answer({})

    def validate(self, _: bytes, __: object) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, _: Repository, /, **__: str) -> None:
        def mode(name: str) -> str:
            return "lfs" if name.endswith(".safetensors") else "regular"

        files = json.loads(body)["files"]
        answers = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
        self.answer({"files": answers})

    def batch(self, body: bytes, _: Repository, /, **__: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer({"objects": objects, "transfer": "basic"})

    def put_large(self, body: bytes, _: object, *, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: Repository, /, *, revision: str, **named: str) -> None:
        changed = dict(repo.branches[revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.large[value["oid"]]
            else:
                del changed[value["path"]]
        repo.branches[revision] = changed
        url = f"{self.hub.endpoint}/{named['repo']}/commit/{'0' * 40}"
        self.answer({"commitUrl": url, "commitOid": "0" * 40})

    def resolve(self, _: bytes, repo: Repository, /, *, revision: str, name: str, **__: str) -> None:
        content = repo.branches.get("main" if revision == "0" * 40 else revision, {}).get(name)
        if content is None:
            return self.missing("EntryNotFound")
        tag = hashlib.sha256(content).hexdigest()
        return self.answer(content, X_Repo_Commit="0" * 40, ETag=f'"{tag}"')


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{REPO}", Handler.info),
    (rf"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/large/(?P<oid>\w+)", Handler.put_large),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: str, token: str | None = TOKEN) -> dict[str, str]:
    """What another process needs in its environment to take the stand-in for the Hub."""
    found = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return found | ({"HF_TOKEN": token} if token else {})
