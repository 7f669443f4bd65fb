"""
A small Hub on loopback, for the real client: `HF_ENDPOINT=server.url`, `HF_HUB_DISABLE_XET=1`.

It keeps repositories of models and Spaces in memory: commits, branches, tags, files in git and in LFS. Writing needs a
token, reading does not. Requests are logged, and can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


__all__ = ["Fault", "HubServer"]

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def info(self, path: str) -> dict:
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.is_lfs:
            info["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return info


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        parent = self.branches.get(branch, "")
        lines = [f"{path} {file.etag}" for path, file in sorted(files.items())]
        sha = hashlib.sha1("\n".join([parent, message, *lines, str(len(self.commits))]).encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if COMMIT.fullmatch(revision):
            return revision if revision in self.commits else None
        return self.branches.get(revision) or self.tags.get(revision)


@dataclass
class Fault:
    """
    What happens to requests whose `METHOD path` matches.

    Args:
        pattern (`str`): Searched in the request.
        status (`int`): The answer; 0 drops the connection in the middle of the right answer.
        times (`int`): How often; -1 is always.
    """

    pattern: str
    status: int
    times: int = -1


class HubServer:
    """
    Runs in a thread, between `with` and its end.

    Args:
        token (`str`): What writing needs.
    """

    def __init__(self, token: str = "hf_test"):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"  # another host: the client sees that

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Answer(Exception):
    """Ends the handling of a request with an error of the Hub."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        request = f"{self.command} {unquote(url.path)}"
        if url.path.startswith("/_test/"):
            return self._control(url.path.removeprefix("/_test/"))
        with self.hub.lock:
            ranged = self.headers.get("Range")
            self.hub.log.append(request + (f" {ranged}" if ranged else ""))
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
        self.drop = fault is not None and fault.status == 0
        if fault is not None and fault.status:
            return self._send_error(_Answer(fault.status, "", f"made to fail with {fault.status}"))
        try:
            with self.hub.lock:
                self._route(url.path)
        except _Answer as answer:
            self._send_error(answer)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _control(self, what: str) -> None:
        """How another process sets faults, moves branches and reads the log."""
        content = json.loads(self.body or "{}")
        with self.hub.lock:
            if what == "faults":
                self.hub.faults = [Fault(**fault) for fault in content]
            elif what == "branch":
                repository = self.hub.repositories[content["repo"]]
                repository.branches[content["name"]] = repository.resolve(content["to"])
            elif what == "log":
                answer, self.hub.log = self.hub.log, []
                return self._send_json(answer)
        self._send_json({})

    def _route(self, path: str) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self._create()
            case "POST", ["api", "validate-yaml"]:
                self._send_json({"errors": [], "warnings": []})
            case "GET", ["api", "whoami-v2"]:
                self._authorize()
                self._send_json({"type": "user", "name": "org", "orgs": [], "auth": {}})
            case "POST", [*_, org, name, "info", "lfs", "objects", "batch"]:  # of a Space, after "spaces"
                self._batch(self._repository(f"{org}/{name.removesuffix('.git')}", write=True))
            case "PUT", ["lfs", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise _Answer(400, "", "other contents than announced")
                self.hub.blobs[oid] = self.body
                self._send(200, b"")
            case "GET" | "HEAD", ["lfs", oid]:
                self._send_content(self.hub.blobs[oid], oid, {})
            case "GET" | "HEAD", [org, name, "resolve", revision, *rest]:
                self._resolve(f"{org}/{name}", revision, "/".join(rest))
            case command, ["api", "models" | "spaces", org, name, *rest]:
                self._api(command, f"{org}/{name}", rest)
            case _:
                raise _Answer(404, "", f"no such route: {self.command} {path}")

    def _api(self, command: str, repo_id: str, rest: list[str]) -> None:
        repository = self._repository(repo_id, write=command != "GET" and rest[0] != "paths-info")
        match command, rest:
            case "GET", [] | ["revision", _]:
                sha = self._sha(repository, rest[1] if rest else "main")
                files = repository.commits[sha]
                self._send_json(
                    {
                        "_id": "0",
                        "id": repo_id,
                        "modelId": repo_id,
                        "sha": sha,
                        "private": repository.private,
                        "tags": ["transformers", "image-text-to-text"],
                        "pipeline_tag": "image-text-to-text",
                        "siblings": [{"rfilename": name} for name in sorted(files)],
                    }
                )
            case "GET", ["tree", revision, *folder]:
                files = repository.commits[self._sha(repository, revision)]
                self._send_json(self._tree(files, "/".join(folder), "recursive" in self.query))
            case "POST", ["paths-info", revision]:
                files = repository.commits[self._sha(repository, revision)]
                form = parse_qs(self.body.decode())
                paths = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
                self._send_json([files[path].info(path) for path in paths if path in files])
            case "GET", ["refs"]:
                refs = {"converts": []}
                for kind, names in (("branches", repository.branches), ("tags", repository.tags)):
                    folder = "heads" if kind == "branches" else "tags"
                    refs[kind] = [
                        {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha}
                        for name, sha in names.items()
                    ]
                self._send_json(refs)
            case "POST", ["preupload", revision]:
                files = repository.commits[self._sha(repository, revision)]
                self._send_json({"files": [self._preupload(files, item) for item in json.loads(self.body)["files"]]})
            case "POST", ["commit", revision]:
                self._commit(repo_id, repository, revision)
            case "POST", ["branch", name]:
                if name in repository.branches:
                    raise _Answer(409, "", "the branch exists")
                start = json.loads(self.body or "{}").get("startingPoint", "main")
                repository.branches[name] = self._sha(repository, start)
                self._send_json({})
            case "POST", ["tag", revision]:
                tag = json.loads(self.body)["tag"]
                if tag in repository.tags:
                    raise _Answer(409, "", "the tag exists")
                repository.tags[tag] = self._sha(repository, revision)
                self._send_json({})
            case _:
                raise _Answer(404, "", f"no such route: {command} {repo_id} {rest}")

    # --- writing ---

    def _create(self) -> None:
        self._authorize()
        content = json.loads(self.body)
        repo_id = f"{content.get('organization') or 'org'}/{content['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            return self._send_json(url, status=409)
        private = content.get("private") or content.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(private=bool(private))
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._send_json(url)

    @staticmethod
    def _preupload(files: dict[str, File], item: dict) -> dict:
        is_lfs = item["path"].endswith((".safetensors", ".bin")) or item["size"] > 10_000_000
        known = files.get(item["path"])
        return {
            "path": item["path"],
            "uploadMode": "lfs" if is_lfs else "regular",
            "shouldIgnore": False,
            "oid": known and known.etag,
        }

    def _batch(self, repository: Repository) -> None:
        answers = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _commit(self, repo_id: str, repository: Repository, branch: str) -> None:
        if branch not in repository.branches:
            raise _Answer(404, "RevisionNotFound", f"no branch {branch}")
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    files[value["path"]] = File(self.hub.blobs[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
                case key:
                    raise _Answer(400, "", f"no {key} here")
        sha = repository.commit(branch, files, message)
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    # --- reading ---

    @staticmethod
    def _tree(files: dict[str, File], folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parents = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                name = prefix + "/".join(parents[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if recursive or not parents:
                entries[path] = file.info(path)
        if folder and not entries:
            raise _Answer(404, "EntryNotFound", f"no folder {folder}")
        return list(entries.values())

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        sha = self._sha(repository, revision)
        headers = {"X-Repo-Commit": sha}
        file = repository.commits[sha].get(path)
        if file is None:
            raise _Answer(404, "EntryNotFound", f"no file {path}")
        if file.is_lfs:
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.etag}"'}
            headers["Location"] = f"{self.hub.storage_url}/lfs/{file.sha256}"
            return self._send(302, b"", headers)
        self._send_content(file.content, file.etag, headers)

    def _send_content(self, content: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, content, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
        self._send(206, content[start : stop + 1], headers)

    # --- parts ---

    def _authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Answer(401, "", "Invalid username or password.")

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        if write:
            self._authorize()
        repository = self.hub.repositories.get(repo_id)
        is_hidden = repository is not None and repository.private
        if is_hidden and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Answer(401, "RepoNotFound", "Repository not found")
        if repository is None:
            raise _Answer(404, "RepoNotFound", "Repository not found")
        return repository

    @staticmethod
    def _sha(repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _send_error(self, answer: _Answer) -> None:
        headers = {"X-Error-Code": answer.code} if answer.code else {}
        self._send(
            answer.status, json.dumps({"error": str(answer)}).encode(), headers | {"X-Error-Message": str(answer)}
        )

    def _send_json(self, content, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "drop", False):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content)
