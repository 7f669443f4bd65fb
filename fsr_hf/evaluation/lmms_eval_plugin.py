"""What lmms-eval reads of the entry-point group `lmms_eval.models`: names of models, and where their classes are."""

from lmms_eval.models.registry_v2 import ModelManifest


__all__ = ["MANIFESTS"]

_CLASSES = {
    "fsr_llava": "FSRLlava",
    "fsr_llava_next": "FSRLlavaNext",
    "fsr_llava_video": "FSRLlavaVideo",
    "fsr_qwen2_5_vl": "FSRQwen2_5_VL",
    "fsr_qwen3_vl": "FSRQwen3VL",
}
MANIFESTS = [
    ModelManifest(model_id=name, chat_class_path=f"fsr_hf.evaluation.lmms_eval_models.{class_name}")
    for name, class_name in _CLASSES.items()
]
