"""
From `push` to `from_pretrained` by Hub id: the real client and a Hub on loopback. For each family, a process with the
package pushes, and one without it, whose cache is empty, loads.
"""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from hub.hub_server import Fault, HubServer
from isolated import ROOT, TESTS, run_python

from fsr_hf.testing.small_families import SMALL_FAMILIES


# Status (0: the connection is lost in the middle), file, and what loads it. The first family tries them all.
FAULTS = [
    (401, "config.json", "AutoConfig"),
    (404, "config.json", "AutoModel"),
    (503, "config.json", "AutoModel"),
    (404, "modeling_fsr_", "AutoModel"),
    (503, "modeling_fsr_", "AutoModel"),
    (503, "generation.py", "AutoModel"),
    (503, "index.json", "AutoModel"),
    (401, "/lfs/", "AutoModel"),
    (404, "/lfs/", "AutoModel"),
    (503, "/lfs/", "AutoModel"),
    (0, "/lfs/", "AutoModel"),
    (503, "processor_config.json", "AutoProcessor"),
    (503, "/tokenizer.json", "AutoProcessor"),
    (0, "query_tokenizer/", "AutoProcessor"),
]


class RoundTrip(NamedTuple):
    hub: HubServer
    pushed: dict  # of `push_process.py`
    loaded: dict  # of `hub_process.py`


def run(script: str, model_type: str, output_dir: Path, *arguments: str, path: list[Path], **environment: str) -> None:
    """Runs a script of this folder."""
    environment |= {"HF_HOME": str(output_dir / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    script = Path(__file__).with_name(script)
    done = run_python(script, model_type, output_dir, *arguments, cwd=output_dir, path=path, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def trip(request, tmp_path_factory):
    model_type = request.param
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    faults = FAULTS if model_type == "fsr_llava" else []
    with HubServer() as hub:
        endpoint = {"HF_ENDPOINT": hub.url}
        run("push_process.py", model_type, here, path=[TESTS, ROOT], HF_TOKEN=hub.token, **endpoint)
        pushed = json.loads((here / "pushed.json").read_text())
        run("hub_process.py", model_type, there, json.dumps(faults), path=[], **endpoint)
        yield RoundTrip(hub, pushed, json.loads((there / "report.json").read_text()))


def test_push_is_one_commit_and_a_tag(trip):
    repository = trip.hub.repositories["org/fsr"]
    assert trip.pushed["push"]["code"] == 0
    assert trip.pushed["push"]["stdout"].splitlines() == [
        f"{trip.hub.url}/org/fsr",
        'AutoModel.from_pretrained("org/fsr", revision="v0.1.0", trust_remote_code=True)',
    ]
    assert list(repository.messages.values())[:2] == ["initial commit", "Upload of fsr"]
    assert repository.tags["v0.1.0"] == list(repository.commits)[1]
    card = repository.commits[repository.tags["v0.1.0"]]["README.md"].content.decode()
    assert 'repo, revision = "org/fsr", "v0.1.0"' in card


def test_a_tag_is_not_moved(trip):
    assert trip.pushed["again"]["code"] == 1
    assert trip.pushed["again"]["stderr"].startswith("fsr-hf: org/fsr has a tag v0.1.0 already")
    assert trip.pushed["again"]["stderr"].count("\n") == 1


def test_a_later_push_removes_what_would_be_loaded_instead(trip):
    repository = trip.hub.repositories["org/fsr"]
    before, after = (
        next(files for sha, files in repository.commits.items() if repository.messages[sha] == message)
        for message in ("Upload model.safetensors with huggingface_hub", "Upload of second")
    )
    listed = json.loads(after["fsr_manifest.json"].content)["files"]
    assert "model.safetensors" in before
    assert ("model.safetensors" in after) == ("model.safetensors" in listed)
    assert after.get("model.safetensors") != before["model.safetensors"]
    assert set(after) == {*listed, ".gitattributes", "README.md", "fsr_manifest.json"}


def test_private_means_private(trip):
    assert trip.pushed["private"]["code"] == 0
    assert trip.hub.repositories["org/secret"].private and not trip.hub.repositories["org/fsr"].private
    for name in ("private", "nobody"):
        assert "is not a local folder and is not a valid model identifier" in trip.loaded[name]


def test_verify_by_id(trip):
    assert trip.pushed["verify"]["code"] == trip.pushed["verify_by_manifest"]["code"] == 0
    (line,) = trip.pushed["plain_verify"]["stdout"].splitlines()  # of `save_pretrained`
    assert trip.pushed["plain_verify"]["code"] == 1 and "lists the code alone" in line
    assert trip.pushed["newer_verify"]["code"] == 1
    name = trip.pushed["newer_file"]
    assert [line.split()[0] for line in trip.pushed["newer_verify"]["stdout"].splitlines()] == [name, name]


def test_same_model_from_the_hub(trip):
    for key in ("digest", "tokens", "classes"):
        assert trip.loaded[key] == trip.pushed[key], key
    assert trip.loaded["missing"] == trip.loaded["fsr_hf"] == []


def test_no_trust_no_model(trip):
    assert len(trip.loaded["refusals"]) == 5
    for name, refusal in trip.loaded["refusals"].items():
        if name == "AutoProcessor" and not trip.pushed["classes"][1].startswith("FSR"):
            assert refusal == "loaded"  # a stock processor
            continue
        assert refusal.startswith("ValueError") and "trust_remote_code=True" in refusal


def test_pipeline_by_id(trip):
    cls, text = trip.loaded["pipeline"]  # which keeps the space before the first word
    assert [cls, text.strip()] == [trip.pushed["classes"][0], trip.loaded["answer"]]


def test_offline_from_the_cache(trip):
    assert trip.loaded["offline"] == [trip.pushed["digest"], []]
    assert trip.loaded["down"] == "loaded"


def test_revisions(trip):
    assert trip.loaded["pinned"] == trip.loaded["budget"] != [None, 0.75]
    assert trip.loaded["updated"] == trip.loaded["branch"] == [None, 0.75]
    assert "v9 is not a valid git identifier" in trip.loaded["no_revision"]


def test_stock_methods_leave_a_repository_that_loads(trip):
    assert trip.loaded["plain"] == [trip.pushed["digest"], trip.pushed["classes"][1]]
    assert {"config.json", "fsr_manifest.json", "remote_code.py"} <= set(trip.pushed["half"])


def test_config_only_repository_changes_the_budget(trip):
    assert trip.loaded["config_only"] == [[None, 0.25], trip.pushed["digest"]]
    assert not [name for name in trip.pushed["budget_files"] if name.endswith(".safetensors")]


def test_adapter_from_the_hub(trip):
    assert trip.loaded["lora_logits"] == pytest.approx(trip.pushed["lora_logits"], rel=1e-4, abs=1e-5)
    assert trip.loaded["plain_logits"] != pytest.approx(trip.pushed["lora_logits"], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("trip", ["fsr_llava"], indirect=True)
def test_failures_are_named_and_a_retry_works(trip):
    assert [tuple(fault[:2]) for fault in trip.loaded["faults"]] == [fault[:2] for fault in FAULTS]
    for status, file, failed, retried, asked in trip.loaded["faults"]:
        assert failed != "loaded", (status, file)
        assert "Error: " in failed and len(failed) > 40, (status, file, failed)
        assert retried == "loaded", (status, file, retried)
        assert len(asked) > len(set(asked)) or status == 0, (status, file)  # the lost connection was taken up again


def test_server_itself():
    """What the tests above rely on: writing needs the token, a fault happens as often as it should, ranges are cut."""

    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(hub.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    with HubServer() as hub:
        repository = json.dumps({"organization": "org", "name": "name"}).encode()
        assert ask("POST", "/api/repos/create", repository)[0] == 401
        assert ask("POST", "/api/repos/create", repository, Authorization=f"Bearer {hub.token}")[0] == 200
        path = "/org/name/resolve/main/.gitattributes"
        assert ask("GET", path) == (200, b"*.safetensors filter=lfs\n")
        assert ask("GET", path, Range="bytes=2-5") == (206, b"safe")
        hub.faults = [Fault("GET .*gitattr", 503, times=2)]
        assert [ask("GET", path)[0] for _ in range(3)] == [503, 503, 200]
        assert ask("GET", "/org/other/resolve/main/config.json")[0] == 404
