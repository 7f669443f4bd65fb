"""Qwen3-VL with FSR."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from ..configuration.configuration_fsr_qwen3_vl import FSRQwen3VLConfig
from ..configuration.remote_code import RemoteCodeMixin
from .compression import KeptVisualOutput
from .generation import FSRGenerationMixin
from .pools import VisualTokens
from .prompt import VisualItem
from .qwen_vl import QwenVLMixin


__all__ = ["FSRQwen3VLForConditionalGeneration", "FSRQwen3VLModel", "KeptDeepstackOutput"]


@dataclass
class KeptDeepstackOutput(KeptVisualOutput):
    """[`KeptVisualOutput`] with features of earlier blocks, which are added to hidden states of the language model."""

    # For each depth, tensors of the sizes of `pooler_output`.
    deepstack_features: list[list[torch.FloatTensor]] | None = None


class FSRQwen3VLModel(QwenVLMixin, Qwen3VLModel):
    """
    [`Qwen3VLModel`] that keeps the visual tokens of each image and video that matter, as [`FSRQwen2_5_VLModel`] does.
    With `fsr_config.pool="view"`, what stands behind a timestamp of a video is a pool of its own; a timestamp stays,
    even if nothing behind it is kept. A kept token keeps its features of all depths; those of an anchor are merged
    with those of the tokens that it absorbs, by the same weights (Eq. 9).
    """

    config_class = FSRQwen3VLConfig

    def __init__(self, config: FSRQwen3VLConfig):
        if config.vision_config.depth < 2:
            raise ValueError(
                f"`vision_config.depth={config.vision_config.depth}` is not supported: saliency is the attention of "
                "the last block, which must have another block before it."
            )
        super().__init__(config)

    def run_lengths(self, modality: str, grid: torch.Tensor) -> list[int]:
        """An image is one run; a video has one behind each timestamp."""
        num_runs = 1 if modality == "image" else int(grid[-1, 0]) + 1
        return [len(grid) // num_runs] * num_runs

    def encode_items(self, items: list[VisualItem], query: None, **visual: Any) -> tuple[VisualTokens, dict[str, Any]]:
        tokens, outputs = super().encode_items(items, query, **visual)
        depths = {
            modality: (torch.cat(rows, dim=-1) for rows in zip(*output.deepstack_features))
            for modality, output in outputs.items()
        }
        tokens.companions = [next(depths[item.modality]) for item in items]
        return tokens, outputs

    def make_output(self, features: list[torch.Tensor], output: Any) -> KeptDeepstackOutput:
        size = self.config.get_text_config().hidden_size
        kept, *depths = zip(*(rows.split(size, dim=-1) for rows in features))
        return KeptDeepstackOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=list(kept),
            deepstack_features=[list(rows) for rows in depths],
        )


class FSRQwen3VLForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, Qwen3VLForConditionalGeneration):
    """
    [`Qwen3VLForConditionalGeneration`] on an [`FSRQwen3VLModel`]: `generate()` and `forward()` prune the visual tokens
    of each image and video. The stock processor is used as it is, as with [`FSRQwen2_5_VLForConditionalGeneration`].
    """

    config_class = FSRQwen3VLConfig
    inner_class = FSRQwen3VLModel
