"""AdamW for bfloat16 weights, with a float32 copy of them that takes the steps."""

import math
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm


__all__ = ["MasterAdamW", "train"]

SAVE_EVERY = 250  # steps


class MasterAdamW:
    """
    Steps of AdamW. Matrices decay, vectors do not.

    Args:
        steps: the learning rate warms up for a twentieth of them, and falls along a cosine that ends with them.
        last_step: where training stops, if before the cosine ends.
        cooldown: up to `last_step` the learning rate also falls in a straight line, from so many steps before it.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        steps: int,
        decay: float = 0.05,
        last_step: int | None = None,
        cooldown: int = 0,
    ):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        groups = [
            {"params": [m for m in self.masters if (m.ndim >= 2) == is_matrix], "weight_decay": decay * is_matrix}
            for is_matrix in (True, False)
        ]
        fused = self.masters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)
        warmup = max(1, steps // 20)

        def scale(step: int) -> float:
            cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
            cooled = 1.0 if not cooldown else ((last_step or steps) - step) / cooldown
            return min((step + 1) / warmup, cosine) * min(max(cooled, 0.01), 1.0)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)

    @torch.no_grad()
    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters):
            # A weight that the step did not use has no gradient.
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        for master, parameter in zip(self.masters, self.parameters):
            parameter.copy_(master)

    def state_dict(self) -> dict:
        return {
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for master, parameter, saved in zip(self.masters, self.parameters, state["masters"]):
            master.copy_(saved)
            parameter.copy_(saved)


def train(
    name: str,
    optimizer: MasterAdamW,
    steps: int,
    make_batch: Callable[[int], tuple],
    loss_of: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]],
    checkpoint,
    log: Callable[[dict], None],
) -> None:
    """
    Train a stage from where its checkpoint stands to the end. The batch of a step depends on the step alone, so that
    a run that was stopped goes on as if it had not been.

    Args:
        make_batch: from the number of a step to the arguments of `loss_of`.
        loss_of: from a batch to the loss and other figures to log.
        checkpoint (`Path`): file of the stage's state.
        log: takes the mean figures of every fifty steps.
    """
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state.pop("step")
        optimizer.load_state_dict(state)
    sums: dict[str, float] = {}
    with tqdm(total=steps, initial=first, desc=name, unit="step") as bar:
        for step in range(first, steps):
            torch.manual_seed(step)
            loss, figures = loss_of(*make_batch(step))
            loss.backward()
            optimizer.step()
            for key, value in {"loss": loss, **figures}.items():
                sums[key] = sums.get(key, 0.0) + value.item() / 50
            bar.update()
            if (step + 1) % 50 == 0:
                bar.set_postfix({key: f"{value:.3f}" for key, value in sums.items()})
                log({"stage": name, "step": step + 1, **sums})
                sums = {}
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                torch.save({"step": step + 1, **optimizer.state_dict()}, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
