"""
What each of two processes does for tests/test_distributed.py, and their start. They talk by gloo, on loopback.

    python ranks.py FOLDER

starts them on the jobs in `FOLDER/jobs.pt`; what rank N gives is then in `FOLDER/N.pt`.
"""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
from families import FAMILIES, Family
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig


__all__ = ["ANSWER", "RANKS", "answer_of", "batch_of", "build", "step"]

RANKS = 2
ANSWER = {"max_new_tokens": 4, "do_sample": False}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),  # processes that wait for each other end so
    )
    try:
        torch.save(work(torch.load(f"{folder}/jobs.pt", weights_only=False)), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------------- what a rank, or a process alone, does


def build(family: Family, fsr_config: dict[str, Any], freeze_tower: bool = False):
    model = family.build(fsr_config=fsr_config).train()
    if freeze_tower:
        model.get_submodule(family.tower).requires_grad_(False)
    return model


def batch_of(family: Family, row: list) -> dict[str, torch.Tensor]:
    """One row, with labels on its words."""
    batch = family.inputs([row])
    is_placeholder = torch.isin(batch["input_ids"], torch.tensor(family.placeholder_ids))
    return batch | {"labels": batch["input_ids"].masked_fill(is_placeholder, -100)}


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Loss, kept tokens and gradients of a step."""
    inner = getattr(model, "module", model).model
    select, kept = inner.selector, []

    def selector(*args, **kwargs):
        selection = select(*args, **kwargs)
        kept.append(selection.indices)
        return selection

    inner.selector = selector
    loss = model(**batch).loss
    loss.backward()
    inner.selector = select
    gradients = {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"loss": loss.detach(), "kept": kept, "gradients": gradients}


def answer_of(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**{name: value for name, value in batch.items() if name != "labels"}, **ANSWER)


def work(jobs: list[tuple]) -> list[dict[str, Any]]:
    """Each job is `(kind, family, rows, fsr_config, folder)`; this rank takes its row, or all take the first one."""
    kinds = {"fsdp": shard_fully, "ddp": share_data, "tp": share_tensors}
    return [kinds[kind](FAMILIES[name], *arguments) for kind, name, *arguments in jobs]


def shard_fully(family, rows, fsr_config, _) -> dict[str, Any]:
    """FSDP2 on each layer of the towers and of the language model, and on the rest. The answer comes first."""
    model, batch = build(family, fsr_config), batch_of(family, rows[distributed.get_rank()])
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    return {"answer": answer_of(model, batch)} | step(model, batch)


def share_data(family, rows, fsr_config, _) -> dict[str, Any]:
    """DistributedDataParallel, with the tower frozen."""
    model, batch = build(family, fsr_config, freeze_tower=True), batch_of(family, rows[distributed.get_rank()])
    return step(DistributedDataParallel(model), batch)


def share_tensors(family, rows, fsr_config, folder) -> dict[str, Any]:
    """Tensor parallelism as transformers plans it, on one batch."""
    model = family.model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).train()
    batch = batch_of(family, rows[0])
    sizes = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters()]
    return {"answer": answer_of(model, batch), "local_size": sum(sizes)} | step(model, batch)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, sys.argv[1:], nprocs=RANKS, start_method="fork")
