"""A hub on this machine: what huggingface_hub's client asks of huggingface.co for models, over HTTP and in memory.

Commits, branches, private repositories and tokens; files by the commit's JSON lines or through Git LFS. Written after
the client's source (`hf_api.py`, `_commit_api.py`, `file_download.py`, `lfs.py` of huggingface_hub 2.4).
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# Who a token belongs to, and what it may do.
TOKENS = {
    "hf_writes": ("anna", "write", ["lab"]),
    "hf_reads": ("anna", "read", []),
    "hf_bert": ("bert", "write", []),
}


class Repository:
    """One model: commits by id, each a dict of path → bytes, and the branches that point at them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Puts a commit on a branch; returns its id."""
        known = json.dumps([branch, len(self.commits), sorted(files)]).encode()
        sha = hashlib.sha1(known, usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or of its own id."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision."""
        return self.commits[self.find(revision)]


class Hub:
    """The state of the server. `refuse` maps the start of "METHOD /path" to the status that it is answered with."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # through Git LFS, by sha256
        self.large_files = ()  # endings of names that the server wants through Git LFS
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

        def send(self, status: int, body: bytes | dict | list = b"", **headers):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def account(self):
            return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def may_read(self, name: str) -> bool:
            account = self.account()
            return account is not None and name.split("/")[0] in (account[0], *account[2])

        def may_write(self, name: str) -> bool:
            return self.may_read(name) and self.account()[1] == "write"

        def answer(self):
            body, path = self.read(), unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            for start, status in hub.refuse.items():
                if hub.asked[-1].startswith(start):
                    return self.send(status, {"error": "as the test wishes"})
            if path.startswith("/large/"):
                hub.large[path.split("/")[2]] = body
                return self.send(200)
            parts = path.strip("/").split("/")
            if parts[0] != "api":
                return self.answer_file(parts, body)
            if parts[1] == "whoami-v2":
                return self.answer_whoami()
            if parts[1] == "validate-yaml":
                return self.answer_yaml(json.loads(body))
            if parts[1:3] == ["repos", "create"]:
                return self.answer_create(json.loads(body))
            return self.answer_model("/".join(parts[2:4]), parts[4:], body)

        def answer_whoami(self):
            if (account := self.account()) is None:
                return self.send(401, {"error": "Invalid credentials in Authorization header"})
            name, role, organisations = account
            auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
            orgs = [{"name": one, "type": "org"} for one in organisations]
            self.send(200, {"type": "user", "name": name, "orgs": orgs, "auth": auth})

        def answer_yaml(self, asked: dict):
            import yaml

            data = yaml.safe_load(asked["content"].split("---")[1])
            if data.get("license") not in (None, "mit", "apache-2.0", "cc-by-nc-4.0"):
                return self.send(400, {"errors": [{"message": '"license" must be one of [apache-2.0, mit, …]'}]})
            self.send(200, {"errors": [], "warnings": []})

        def answer_create(self, asked: dict):
            account = self.account()
            name = f"{asked['organization'] or account[0]}/{asked['name']}"
            if not self.may_write(name):
                return self.send(403, {"error": "You don't have the rights to create a model under this namespace"})
            if name in hub.repositories:
                return self.send(409, {"url": f"{hub.url}/{name}", "error": "You already created this model repo"})
            hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            self.send(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def repository(self, name: str) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None or found.private and not self.may_read(name):
                # As the hub does: without an account nobody learns whether there is a private one.
                status = 401 if self.account() is None else 404
                self.send(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return None
            return found

        def answer_model(self, name: str, rest: list[str], body: bytes):
            if (repository := self.repository(name)) is None:
                return
            if rest[:1] == ["branch"]:
                if "/".join(rest[1:]) in repository.branches:
                    return self.send(409, {"error": "Reference already exists"})
                repository.branches["/".join(rest[1:])] = repository.branches["main"]
                return self.send(201)
            revision = "/".join(rest[1:]) or "main"
            if (sha := repository.find(revision)) is None:
                return self.send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            if rest[:1] == ["preupload"]:
                asked = json.loads(body)["files"]
                self.send(200, {"files": [{**one, **self.mode(one["path"])} for one in asked]})
            elif rest[:1] == ["commit"]:
                self.answer_commit(name, repository, revision, body)
            elif rest[:1] == ["tree"]:
                files = repository.commits[sha].items()
                self.send(200, [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files])
            else:
                siblings = [{"rfilename": path} for path in repository.commits[sha]]
                values = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": []}
                self.send(200, {**values, "siblings": siblings, "downloads": 0, "likes": 0})

        def mode(self, path: str) -> dict:
            return {"uploadMode": "lfs" if path.endswith(tuple(hub.large_files)) else "regular", "shouldIgnore": False}

        def answer_commit(self, name: str, repository: Repository, branch: str, body: bytes):
            if not self.may_write(name):
                return self.send(403, {"error": "Forbidden: you may not write here"})
            files = dict(repository.files(branch))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            sha = repository.commit(branch, files)
            self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        def answer_file(self, parts: list[str], body: bytes):
            name = "/".join(parts[:2])
            if parts[2:] == ["info", "lfs", "objects", "batch"]:
                found = [{**one, "actions": self.upload(one["oid"])} for one in json.loads(body)["objects"]]
                return self.send(200, {"transfer": "basic", "objects": found})
            if (repository := self.repository(name)) is None:
                return
            sha, path = repository.find(parts[3]), "/".join(parts[4:])
            if sha is None:
                return self.send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            if (content := repository.commits[sha].get(path)) is None:
                return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            self.send(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=sha)

        def upload(self, oid: str) -> dict:
            return {"upload": {"href": f"{hub.url}/large/{oid}"}}

    return Handler


def _oid(content: bytes) -> str:
    # As git names a blob.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def running_hub():
    """Context manager: a hub that answers on this machine; gives its `Hub`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
