"""Qwen3-VL with FSR in vLLM: images."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.qwen3_vl import (
    Qwen3LLMForCausalLM,
    Qwen3VLDummyInputsBuilder,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as StockModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_model import FSRServedModel
from .vllm_processing import FSRInfoMixin, FSRMultiModalProcessorMixin


__all__ = ["FSRQwen3VLForConditionalGeneration"]


class FSRQwen3VLProcessingInfo(FSRInfoMixin, Qwen3VLProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            raise ValueError(
                "Videos of Qwen3-VL are not supported by FSR in vLLM: kept tokens of a frame follow its timestamp, "
                "and how many a frame keeps is known only when the vision tower has run. Send frames as images, use "
                "`generate()` of the transformers model, or serve the stock checkpoint unpruned."
            )
        super().validate_num_items(modality, num_items)


class FSRQwen3VLMultiModalProcessor(FSRMultiModalProcessorMixin, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    FSRQwen3VLMultiModalProcessor, info=FSRQwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FSRQwen3VLForConditionalGeneration(FSRServedModel):
    """`FSRQwen3VLForConditionalGeneration` as vLLM serves it."""

    placeholder_text = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}

    # Features of earlier blocks stand beside those of the last one, here as there: vLLM's own methods hand them on.
    embed_input_ids = StockModel.embed_input_ids
    forward = StockModel.forward
    _compute_deepstack_embeds = StockModel._compute_deepstack_embeds
    _get_deepstack_input_embeds = StockModel._get_deepstack_input_embeds
    _resize_deepstack_input_embeds = StockModel._resize_deepstack_input_embeds
    _set_deepstack_input_embeds = StockModel._set_deepstack_input_embeds
    _clear_deepstack_input_embeds = StockModel._clear_deepstack_input_embeds

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        size, depths = self.config.text_config.hidden_size, self.config.vision_config.deepstack_visual_indexes
        self.use_deepstack, self.deepstack_num_level = True, len(depths)
        self.visual_dim, self.multiscale_dim = size, size * len(depths)
        self.deepstack_input_embeds = [
            torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, size) for _ in depths
        ]
        self.deepstack_input_embeds_num_tokens = 0

    def make_language_model(self, vllm_config: Any, text: Any, prefix: str) -> Any:
        # No model of vLLM's registry: it takes the features of earlier blocks.
        text_config = vllm_config.with_hf_config(text, architectures=["Qwen3ForCausalLM"])
        return Qwen3LLMForCausalLM(vllm_config=text_config, prefix=prefix)
