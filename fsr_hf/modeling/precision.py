"""Scores and cosines are computed in float32, under autocast too."""

import torch


__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> torch.autocast:
    """A context that turns autocast off on `device`."""
    # The meta device has no autocast; `torch.autocast` refuses its name, so another device stands in.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)
