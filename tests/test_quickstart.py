"""The notebook, run by a kernel of its own as its reader would run it; it pushes to a Hub on loopback."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from hub.hub_server import HubServer
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
sys.path.append(str(EXAMPLES))  # the notebook's `shapes_vqa`
from shapes_vqa.data import make_scene  # noqa: E402


@pytest.fixture(scope="module")
def run():
    """The executed cells that print or return something, in order, and the repository that they pushed."""
    notebook = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("HF_ENDPOINT", hub.url),
            ("HF_TOKEN", hub.token),
            ("HF_HUB_DISABLE_XET", "1"),
            ("HF_HUB_OFFLINE", "0"),
            ("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])),
        ):
            patch.setenv(name, value)
        client = NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}
        )
        client.execute()
    return [cell for cell in notebook.cells if cell.get("outputs")], hub.repositories["org/shapes-digits-fsr"]


def texts(cell) -> list[str]:
    """Streams and results of a cell as text."""
    return [output["text"] if "text" in output else output["data"]["text/plain"] for output in cell["outputs"]]


def test_answers_are_right(run):
    """By what was drawn, unpruned and at each budget but the smallest."""
    cells, _ = run
    objects = make_scene((1 << 30) + 5).objects
    (digit,) = [item.character for item in objects if item.pair == ("triangle", "green")]
    (color,) = [item.color for item in objects if item.shape == "heart"]
    right = [digit, color, ("zero", "one", "two", "three")[sum(item.color == "green" for item in objects)]]
    assert texts(cells[0])[-1] == "(16, 144)"
    assert list(ast.literal_eval(texts(cells[2])[0]).values()) == right
    lines = "".join(texts(cells[3])).splitlines()
    assert [line.endswith(str(right)) for line in lines] == [True, True, True, False]  # one token is too few to count


def test_pictures_are_shown(run):
    cells, _ = run
    assert "image/png" in cells[1]["outputs"][0]["data"]
    first, second = [output["data"]["image/png"] for output in cells[4]["outputs"]]
    assert first != second  # another question, other tokens


def test_it_learns_to_count_in_digits(run):
    cells, _ = run
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", "".join(texts(cells[5])))]
    assert losses[-1] < losses[0] / 2
    printed = "".join(texts(cells[6]))
    before, after = (ast.literal_eval(text) for text in re.findall(r"(?:before|after) (\{.*\})", printed))
    assert [list(answers.values())[-1] for answers in (before, after)] == ["two", "2"]
    counts, in_digits = map(int, re.search(r"Of (\d+) counts, (\d+) are in digits", printed).groups())
    before, after = map(int, re.search(r"Right were (\d+), and now are (\d+)", printed).groups())
    assert counts > 20 and in_digits == counts
    assert min(before, after) > counts / 2


def test_it_pushes(run):
    """Weights and code, and what comes back answers in digits."""
    cells, repository = run
    files = repository.commits[repository.branches["main"]]
    assert {"config.json", "model.safetensors", "modeling_fsr_llava.py", "processor_config.json"} <= files.keys()
    assert json.loads(files["config.json"].content)["auto_map"]["AutoModel"].startswith("modeling_fsr_llava.")
    assert ast.literal_eval(texts(cells[7])[-1]).isdigit()


def test_the_stored_outputs_are_of_this_notebook():
    """They are shown where nobody runs it: each cell ran, in order, and none failed."""
    cells = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"/(?:work|root|home|tmp)/", json.dumps([cell.outputs for cell in cells]))
