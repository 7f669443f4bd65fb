"""Qwen2.5-VL with FSR in vLLM: images and videos."""

from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_model import FSRServedModel
from .vllm_processing import FSRInfoMixin, FSRMultiModalProcessorMixin


__all__ = ["FSRQwen2_5_VLForConditionalGeneration"]


def _take_items(inner: Any, numbers: dict[str, list[int]], visual: dict[str, Any]) -> dict[str, Any]:
    """As of the inner model, with the times of videos, which positions depend on."""
    taken = inner.take_items(numbers, **visual)
    seconds = visual.get("second_per_grid_ts")
    if numbers["video"] and seconds is not None:
        taken["second_per_grid_ts"] = [float(seconds[number]) for number in numbers["video"]]
    return taken


class FSRQwen2_5_VLProcessingInfo(FSRInfoMixin, Qwen2_5_VLProcessingInfo):
    pass


class FSRQwen2_5_VLMultiModalProcessor(FSRMultiModalProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        return _take_items(self.inner, numbers, visual)


@MULTIMODAL_REGISTRY.register_processor(
    FSRQwen2_5_VLMultiModalProcessor, info=FSRQwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class FSRQwen2_5_VLForConditionalGeneration(FSRServedModel):
    """`FSRQwen2_5_VLForConditionalGeneration` as vLLM serves it."""

    placeholder_text = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }
    text_architecture = "Qwen2ForCausalLM"

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        return _take_items(self.tower, numbers, visual)
