# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.precision), do not edit.
"""Matrix products of scores, which are float32 whatever the model's dtype."""

import torch


__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which products on `device` keep their precision. The meta device has no autocast to turn off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)
