"""
`fsr-hf eval --tasks`: the paper's numbers and the report; and, where lmms-eval is installed (`make test-lmms-eval`),
the command itself on a task of drawn pictures.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from drawn_questions import make_inputs, write_task
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from fsr_hf.cli import app
from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.evaluation import lmms_eval_tasks
from fsr_hf.evaluation.lmms_eval_tasks import paper_results


ROOT = Path(__file__).parents[2]
QUESTIONS = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_paper_results_are_those_of_the_docs():
    """Table by table, number by number: docs/paper.md is written by hand."""
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    tables = {table["model"]: table for table in paper_results()["tables"]}
    seen = set()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        table = tables[title.strip()]
        seen.add(title.strip())
        header, _, *rows = re.search(r"(?:\|.*\n)+", body)[0].splitlines()
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
        assert cells[0][1:-1] == table["benchmarks"]
        found = {}
        for budget, *numbers in (row[:-1] for row in cells[1:]):
            if budget.endswith("%"):
                budget = str(round(1 - float(budget[:-1]) / 100, 2))
            found[budget] = [float(number) for number in numbers]
        assert found == table["rows"]
    assert seen == set(tables)


def test_tasks_of_the_docs_stand_for_the_benchmarks():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^fsr-hf eval \S+ --tasks (\S+) --budgets (\S+)", text.partition("## The paper's tables")[2], re.M
    )
    paper = paper_results()
    models = [table for table in paper["tables"] if table["model"] != "LLaVA-NeXT-13B"]  # as the 7B
    assert len(commands) == len(models)
    for (tasks, budgets), table in zip(commands, models):
        expected = [paper["benchmarks"][name]["task"] for name in table["benchmarks"] if paper["benchmarks"][name]]
        assert tasks.split(",") == expected
        assert ["unpruned", *budgets.split(",")] == list(table["rows"])


def test_the_paper_stands_beside_model_task_and_budget(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: llava-hf/llava-1.5-7b-hf\n---\n")
    results = {
        label: {
            "mme": {"metrics": {"mme_perception_score": 1500.0, "mme_cognition_score": more}, "tokens": tokens},
            "gqa": {"metrics": {"exact_match": 0.61}, "tokens": tokens},
            "other": {"metrics": {"first": 0.5, "second": 2.0}, "tokens": None},
        }
        for label, more, tokens in (("unpruned", 350.0, 620), ("64", 210.0, 108), ("50", 200.0, 94))
    }
    settings = {"limit": 5, "machine": "a machine", "versions": {"torch": "2"}}
    report = lmms_eval_tasks._build_report(str(tmp_path), ["mme", "gqa", "other"], results, settings)
    rows = {(row["task"], row["metric"]): row for row in report["rows"]}
    mme = rows["mme", "mme_perception_score + mme_cognition_score"]
    assert mme["values"] == {"unpruned": 1850.0, "64": 1710.0, "50": 1700.0}
    assert mme["paper"] == {"unpruned": 1862, "64": 1701}  # nothing for 50
    assert rows["gqa", "exact_match"]["values"]["64"] == pytest.approx(61.0)
    assert rows["gqa", "exact_match"]["paper"] == {"unpruned": 61.9, "64": 58.2}
    assert rows["gqa", "tokens read"]["values"] == {"unpruned": 620, "64": 108, "50": 94}
    assert rows["other", "first"]["paper"] == {} and rows["other", "second"]["values"]["50"] == 2.0
    text = "\n".join(lmms_eval_tasks._format_report(report))
    assert "61 [58.2]" in text and "1,710 [1,701]" in text and "LLaVA-1.5-7B" in text and "arXiv 2602.05809" in text
    assert "Only 5 questions of each task" in text

    (tmp_path / "README.md").write_text("---\nbase_model: llava-hf/llava-1.5-13b-hf\n---\n")
    report = lmms_eval_tasks._build_report(str(tmp_path), ["gqa"], results, settings)
    assert all(row["paper"] == {} for row in report["rows"])
    assert "no table of llava-hf/llava-1.5-13b-hf" in "\n".join(lmms_eval_tasks._format_report(report))


def test_a_group_without_a_metric_is_the_mean_of_its_tasks():
    results = {
        "results": {
            "group": {" ": " ", "alias": "group"},
            "a": {"alias": "a", "accuracy,none": 50.0, "accuracy_stderr,none": 3.0, "samples": 9},
            "b": {"accuracy,none": 70.0, "submission,none": None},
        },
        "group_subtasks": {"group": ["a", "b"]},
    }
    assert lmms_eval_tasks._metrics(results, "group") == {"accuracy": 60.0}
    assert lmms_eval_tasks._metrics(results, "b") == {"accuracy": 70.0}
    results["results"]["b"] = {"submission,none": None}
    with pytest.raises(RuntimeError, match="no metric of b"):
        lmms_eval_tasks._metrics(results, "b")


def test_options_of_the_other_kind_are_refused(tmp_path):
    for arguments, expected in (
        ((), "give either --data or --tasks"),
        (("--data", tmp_path, "--tasks", "gqa"), "give either --data or --tasks"),
        (("--tasks", "gqa", "--metric", "anls"), "--metric goes with --data"),
        (("--data", tmp_path, "--model-args", "a=1"), "--model-args goes with --tasks"),
    ):
        result = invoke(shapes_vqa_folder(), *arguments)
        assert result.exit_code == 2 and expected in result.stderr


# ---------------------------------------------------------------------- with lmms-eval


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of a task on this machine."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: `make test-lmms-eval` installs and tests it")
    folder = tmp_path_factory.mktemp("task")
    for part, rows in (("first", QUESTIONS[:3]), ("second", QUESTIONS[3:])):
        write_task(folder, f"drawn_{part}", rows)
    (folder / "group.yaml").write_text("group: drawn\ntask: [drawn_first, drawn_second]\n")
    return folder


def test_the_command(task, tmp_path, monkeypatch):
    folder = shapes_vqa_folder()
    arguments = (folder, "--include-path", task, "--tasks", "drawn_first,drawn", "--budgets", "6,0.5")
    arguments += ("--device", "cpu", "--output", tmp_path / "eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    rows = {(row["task"], row["metric"]): row["values"] for row in report["rows"]}

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    budgets = {"unpruned": ({"fsr_enabled": False}, 144), "6": ({"num_visual_tokens": 6}, 6)}
    budgets["0.5"] = ({"retention_ratio": 0.5}, 72)
    for label, (options, kept) in budgets.items():
        right, lengths = [], []
        for asked in QUESTIONS:
            inputs = make_inputs(processor, PICTURES / asked["image"], asked["question"]).to(torch.bfloat16)
            length = inputs["input_ids"].shape[1]
            output = model.generate(**inputs, **options, max_new_tokens=8, do_sample=False)[0, length:]
            right.append(processor.decode(output, skip_special_tokens=True) == asked["answer"])
            lengths.append(length - 144 + kept)
        assert rows["drawn_first", "exact_match"][label] == pytest.approx(sum(right[:3]) / 3)
        assert rows["drawn", "exact_match"][label] == pytest.approx((sum(right[:3]) / 3 + sum(right[3:]) / 2) / 2)
        assert rows["drawn_first", "tokens read"][label] == pytest.approx(sum(lengths[:3]) / 3)
        assert rows["drawn", "tokens read"][label] == pytest.approx(sum(lengths) / 5)

    def fail(*_, **__):
        raise AssertionError("everything is done")

    monkeypatch.setattr(lmms_eval_tasks.subprocess, "run", fail)
    again = invoke(*arguments)
    assert again.exit_code == 0 and json.loads((tmp_path / "eval" / "report.json").read_text()) == report
    other = invoke(*arguments, "--limit", 2)
    assert other.exit_code == 1 and "another run" in other.stderr


def test_refuses_before_lmms_eval_runs(task, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms_eval_tasks.subprocess, "run", None)
    folder = shapes_vqa_folder()
    for arguments, expected in (
        ((folder, "--tasks", "drawn_frist", "--include-path", task), "Did you mean drawn_first"),
        ((folder, "--tasks", "drawn", "--include-path", task / "none"), "there is no such folder"),
        ((folder, "--tasks", "drawn", "--include-path", task, "--budgets", "145"), "--budgets 145 is above"),
        ((tmp_path / "none", "--tasks", "drawn", "--include-path", task), "neither a folder nor"),
    ):
        result = invoke(*arguments, "--output", tmp_path / "eval")
        assert result.exit_code == 1 and expected in result.stderr, (arguments, result.output)
        assert not (tmp_path / "eval").exists()
