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
    """
    [`KeptVisualOutput`] with features of earlier blocks of the vision tower, which are added to the hidden states of
    the first layers of the language model.

    Args:
        deepstack_features (`list[list[torch.FloatTensor]]`, *optional*):
            For each depth, tensors of the sizes of `pooler_output`.
    """

    deepstack_features: list[list[torch.FloatTensor]] | None = None


class FSRQwen3VLModel(QwenVLMixin, Qwen3VLModel):
    """
    [`Qwen3VLModel`] that keeps the visual tokens of each image and video that matter (Focus-Scan-Refine,
    [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    Tokens are ranked by the attention that they receive in the last block of the vision tower. An image or a video is
    one pool, whatever its resolution (`fsr_config.pool="view"`: what stands behind a timestamp of a video is a pool of
    its own, with an equal share of the budget). A timestamp stays, even if nothing behind it is kept. Kept tokens and
    text keep the positions of the full prompt (`fsr_config.positions="compact"`: a row that is pruned counts one by
    one, as if all were text). A kept token keeps its features of all depths; those of an anchor are merged with those
    of the tokens that it absorbs, by the same weights (Eq. 9).

    Args:
        config (`FSRQwen3VLConfig`):
            Its vision tower must have more than one block.
    """

    config_class = FSRQwen3VLConfig
    config: FSRQwen3VLConfig

    def __init__(self, config: FSRQwen3VLConfig):
        if config.vision_config.depth < 2:
            raise ValueError(
                f"`vision_config.depth={config.vision_config.depth}` is not supported: FSR reads saliency from the "
                "attention of the last block, which must have another block before it."
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
    of each image and video. The stock processor is used as it is.

    Args:
        config (`FSRQwen3VLConfig`):
            As for [`FSRQwen3VLModel`].

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("org/Qwen3-VL-8B-Instruct-fsr", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("org/Qwen3-VL-8B-Instruct-fsr")
    >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> out = model.generate(**inputs, max_new_tokens=64)
    ```
    """

    config_class = FSRQwen3VLConfig
    config: FSRQwen3VLConfig
    inner_class = FSRQwen3VLModel
