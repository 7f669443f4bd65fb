"""LLaVA-NeXT with FSR in vLLM."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..modeling.anyres import count_views, tiles_of
from .vllm_model import FSRServedModel
from .vllm_processing import FSRInfoMixin, FSRMultiModalProcessorMixin


__all__ = ["FSRLlavaNextForConditionalGeneration", "join_views"]


def join_views(data: Mapping[str, Any]) -> dict[str, Any]:
    """The views of all images in one tensor, and the sizes of the images."""
    if data.get("pixel_values") is None:
        return {}
    return {"pixel_values": torch.cat(list(data["pixel_values"])), "image_sizes": data["image_sizes"]}


class FSRLlavaNextProcessingInfo(FSRInfoMixin, LlavaNextProcessingInfo):
    pass


class FSRLlavaNextMultiModalProcessor(FSRMultiModalProcessorMixin, LlavaNextMultiModalProcessor):
    def split_pixels(self, data: Any) -> None:
        # The processor pads images with few views to the most views of a call.
        numbers = count_views(tiles_of(data["image_sizes"], self.inner.config))
        data["pixel_values"] = [views[:number] for views, number in zip(data["pixel_values"], numbers)]

    def join_visual(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return join_views(data)


@MULTIMODAL_REGISTRY.register_processor(
    FSRLlavaNextMultiModalProcessor, info=FSRLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FSRLlavaNextForConditionalGeneration(FSRServedModel):
    """`FSRLlavaNextForConditionalGeneration` as vLLM serves it."""

    def join_visual(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return join_views(inputs)
