"""Two processes: FSDP2, distributed data parallel and tensor parallelism give what one process gives."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import BOS, FAMILIES, Family
from isolated import ROOT, TESTS, run_python
from ranks import RANKS, answer_of, batch_of, build, step


@dataclass
class Job:
    """One way to share the work, and what each rank gave."""

    kind: str
    family: Family
    fsr_config: dict[str, Any]
    results: Any = None

    def __str__(self) -> str:
        return "-".join([self.kind, self.family.name, *(["uneven"] if self.fsr_config else [])])

    @property
    def rows(self) -> list[list]:
        """A row for each rank, with an item of the first and one of the last kind."""
        kinds = self.family.kinds
        return [[BOS, 20 + k, self.family.item(kind, k), 31, 32, 33] for k, kind in enumerate((kinds[0], kinds[-1]))]


# Enough for the item of one rank and not for that of the other. (All pictures of LLaVA-1.5 are of one size.)
UNEVEN = {"llava_next": 60, "qwen2_5_vl": 15, "qwen3_vl": 15, "llava_video": 48}
JOBS = [
    *(Job(kind, family, {}) for kind in ("fsdp", "ddp", "tp") for family in FAMILIES.values()),
    *(Job("fsdp", FAMILIES[name], {"num_visual_tokens": budget}) for name, budget in UNEVEN.items()),
]


@pytest.fixture(scope="module", autouse=True)
def done(tmp_path_factory):
    """All jobs, in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for job in JOBS:
        if job.kind == "tp":
            build(job.family, job.fsr_config).save_pretrained(folder / job.family.name)
    arguments = [(j.kind, j.family.name, j.rows, j.fsr_config, folder / j.family.name) for j in JOBS]
    torch.save(arguments, folder / "jobs.pt")
    ran = run_python(TESTS / "ranks.py", folder, cwd=folder, path=[TESTS, ROOT])
    assert ran.returncode == 0, ran.stderr[-4000:]
    for job, *results in zip(JOBS, *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS))):
        job.results = results


@pytest.fixture(params=JOBS, ids=str)
def job(request) -> Job:
    return request.param


def test_two_processes_do_what_one_does(job):
    expected = []
    for row in job.rows if job.kind != "tp" else job.rows[:1] * RANKS:
        model, batch = build(job.family, job.fsr_config, freeze_tower=job.kind == "ddp"), batch_of(job.family, row)
        expected.append({"answer": answer_of(model, batch)} | step(model, batch))
    for actual, alone in zip(job.results, expected):
        torch.testing.assert_close(actual["loss"], alone["loss"])
        assert len(actual["kept"]) == len(alone["kept"])
        assert all(torch.equal(left, right) for left, right in zip(actual["kept"], alone["kept"]))
        if "answer" in actual:
            assert torch.equal(actual["answer"], alone["answer"])
        assert actual["gradients"].keys() == expected[0]["gradients"].keys() | expected[1]["gradients"].keys()
        scale = max(gradient.abs().max() for gradient in actual["gradients"].values())
        for name, gradient in actual["gradients"].items():
            parts = [alone["gradients"].get(name, torch.zeros_like(gradient)) for alone in expected]
            mean = sum(parts) / RANKS
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=float(scale) * 1e-5, msg=f"{job}: {name}")
    assert sum(bool(result["kept"]) for result in job.results) == (1 if job.fsr_config else RANKS)
    if job.kind == "tp" and job.family.name != "qwen3_vl":  # of which transformers shards nothing below 5.24
        assert all(result["local_size"] < sum(p.numel() for p in model.parameters()) for result in job.results)
