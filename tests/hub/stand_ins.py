"""Small checkpoints of every family, exported as the published ones are, with all that a processor needs."""

from functools import partial

from fsr_hf.testing.small_families import SMALL_FAMILIES, export_small_model


__all__ = ["STAND_INS"]

STAND_INS = {model_type: partial(export_small_model, model_type) for model_type in SMALL_FAMILIES}
