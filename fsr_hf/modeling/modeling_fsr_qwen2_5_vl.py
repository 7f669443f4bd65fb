"""Qwen2.5-VL with FSR."""

from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.vision_utils import get_vision_window_index

from ..configuration.configuration_fsr_qwen2_5_vl import FSRQwen2_5_VLConfig
from ..configuration.remote_code import RemoteCodeMixin
from .checkpoint_keys import register_stock_keys
from .generation import FSRGenerationMixin
from .qwen_vl import QwenVLMixin


__all__ = ["FSRQwen2_5_VLForConditionalGeneration", "FSRQwen2_5_VLModel"]


class FSRQwen2_5_VLModel(QwenVLMixin, Qwen2_5_VLModel):
    """
    [`Qwen2_5_VLModel`] that keeps the visual tokens of each image and video that matter (Focus-Scan-Refine, [arXiv
    2602.05809](https://arxiv.org/abs/2602.05809)): those that receive most attention in the last block of the vision
    tower, which must be one of full attention, and some that cover the rest. An image or a video is one pool, whatever
    its resolution (`fsr_config.pool="view"`: each temporal slice of a video is a pool of its own). Kept tokens and
    text keep the positions of the full prompt (`fsr_config.positions="compact"`: a row that is pruned counts one by
    one, as if all were text).
    """

    config_class = FSRQwen2_5_VLConfig
    visual_inputs = (*QwenVLMixin.visual_inputs, "second_per_grid_ts")
    rope_inputs = (*QwenVLMixin.rope_inputs, "second_per_grid_ts")

    def __init__(self, config: FSRQwen2_5_VLConfig):
        vision = config.vision_config
        if vision.depth < 2 or vision.depth - 1 not in vision.fullatt_block_indexes:
            raise ValueError(
                f"`vision_config.depth={vision.depth}` and `vision_config.fullatt_block_indexes="
                f"{list(vision.fullatt_block_indexes)}` are not supported: saliency is the attention of the last "
                f"block (index {vision.depth - 1}), which must be one of full attention and not the first."
            )
        super().__init__(config)

    def check_grids(self, modality: str, visual: dict[str, Any]) -> list[list[int]]:
        grids = super().check_grids(modality, visual)
        seconds = visual.get("second_per_grid_ts")
        if modality == "video" and seconds is not None and grids and len(seconds) != len(grids):
            raise ValueError(
                f"`second_per_grid_ts` has {len(seconds)} numbers for {len(grids)} videos: it must have one for each."
            )
        return grids

    def block_order(self, grid: torch.Tensor) -> torch.Tensor:
        # By windows, which do not cross slices.
        tower: Any = self.visual
        return get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]


class FSRQwen2_5_VLForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """
    [`Qwen2_5_VLForConditionalGeneration`] on an [`FSRQwen2_5_VLModel`]: `generate()` and `forward()` prune the visual
    tokens of each image and video. The stock processor is used as it is.

    ```python
    >>> model = AutoModel.from_pretrained("org/Qwen2.5-VL-7B-Instruct-fsr", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("org/Qwen2.5-VL-7B-Instruct-fsr")
    >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> out = model.generate(**inputs, max_new_tokens=64)
    ```
    """

    config_class = FSRQwen2_5_VLConfig
    inner_class = FSRQwen2_5_VLModel


register_stock_keys(FSRQwen2_5_VLForConditionalGeneration, "Qwen2VLForConditionalGeneration")
register_stock_keys(FSRQwen2_5_VLModel, "Qwen2VLModel")
