"""LLaVA-Video with FSR in vLLM: videos, and one image a prompt."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..modeling.anyres import count_views, list_sizes, take_views, tiles_of
from .vllm_llava_next import join_views
from .vllm_model import FSRServedModel
from .vllm_processing import FSRInfoMixin, FSRMultiModalProcessorMixin


__all__ = ["FSRLlavaVideoForConditionalGeneration"]


def _join_visual(data: Mapping[str, Any]) -> dict[str, Any]:
    visual = join_views(data)
    if data.get("pixel_values_videos") is not None:
        videos = list(data["pixel_values_videos"])
        visual["pixel_values_videos"] = pad_sequence(videos, batch_first=True)
        visual["video_num_frames"] = torch.tensor([len(video) for video in videos])
    return visual


def _num_views(inner: Any, image_sizes: Any) -> list[int]:
    return count_views(tiles_of(image_sizes, inner.config))


def _take_items(inner: Any, numbers: dict[str, list[int]], visual: dict[str, Any]) -> dict[str, Any]:
    """Every image is alone in its prompt, so that none has a say in whether another has tiles."""
    taken = inner.take_items({**numbers, "image": []}, **visual)
    if images := numbers["image"]:
        num_views = _num_views(inner, visual["image_sizes"])
        sizes = list_sizes(visual["image_sizes"])
        taken["pixel_values"] = take_views(visual["pixel_values"], num_views, images)
        taken["image_sizes"] = torch.tensor([sizes[number] for number in images])
    if videos := numbers["video"]:
        # Without the padding that only other videos of the batch need.
        taken["pixel_values_videos"] = taken["pixel_values_videos"][:, : int(taken["video_num_frames"].max())]
        assert len(videos) == len(taken["pixel_values_videos"])
    return {name: value for name, value in taken.items() if value is not None}


class FSRLlavaVideoProcessingInfo(FSRInfoMixin, LlavaOnevisionProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1, "video": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "image" and num_items > 1:
            raise ValueError(
                f"{num_items} images in a prompt of LLaVA-Video are not supported by FSR in vLLM, one is: with "
                "several, none of them has tiles, and vLLM encodes each by itself. Send them as a video, or use "
                "`generate()` of the transformers model."
            )
        super().validate_num_items(modality, num_items)

    def _get_num_frame_tokens(self, *, image_width: int, image_height: int) -> int:
        config = self.get_hf_config()
        side = config.vision_config.image_size // config.vision_config.patch_size
        pooled = side // 2 if config.spatial_pool_mode == "average" else (side + 1) // 2
        return pooled * (pooled + 1)


class FSRLlavaVideoMultiModalProcessor(FSRMultiModalProcessorMixin, LlavaOnevisionMultiModalProcessor):
    def split_pixels(self, data: Any) -> None:
        if "pixel_values" in data:
            numbers = _num_views(self.inner, data["image_sizes"])
            data["pixel_values"] = [views[:number] for views, number in zip(data["pixel_values"], numbers)]

    def join_visual(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return _join_visual(data)

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        return _take_items(self.inner, numbers, visual)


@MULTIMODAL_REGISTRY.register_processor(
    FSRLlavaVideoMultiModalProcessor, info=FSRLlavaVideoProcessingInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class FSRLlavaVideoForConditionalGeneration(FSRServedModel):
    """`FSRLlavaVideoForConditionalGeneration` as vLLM serves it."""

    placeholder_text = {"image": "<image>", "video": "<video>"}

    def join_visual(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return _join_visual(inputs)

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        return _take_items(self.tower, numbers, visual)
