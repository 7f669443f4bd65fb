"""What lmms-eval reads of the entry-point group `lmms_eval.models`: names of models, and where their classes are."""

from lmms_eval.models.registry_v2 import ModelManifest

from ..hub.families import FAMILIES


__all__ = ["MANIFESTS"]

_MODULE = "fsr_hf.evaluation.lmms_eval_models"
MANIFESTS = [
    ModelManifest(
        model_id=family.config.model_type,
        chat_class_path=f"{_MODULE}.{family.model.__name__.removesuffix('ForConditionalGeneration')}",
    )
    for family in FAMILIES
]
