# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.clip_tower), do not edit.
"""What LLaVA-1.5 and LLaVA-NeXT share: scores from a CLIP tower and from the text side of its CLIP."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .generation import FSRGenerationMixin
from .relevance import CLIPRelevance
from .saliency import cls_attention


__all__ = ["CLIPTowerMixin"]


class CLIPTowerMixin(FSRGenerationMixin):
    """
    Saliency from the [CLS] row of the selected block, relevance from `text_encoder`, where the config describes one.
    """

    def __init__(self, config):
        check_clip_tower(config, config.vision_feature_layer, config.vision_feature_select_strategy)
        super().__init__(config)
        text_config = config.fsr_config.text_encoder_config
        self.text_encoder: Any = None
        if text_config is not None:
            self.text_encoder = CLIPRelevance(text_config, config.vision_config.hidden_size)
        elif config.fsr_config.relevance == "clip":
            raise ValueError(
                '`fsr_config.relevance="clip"` needs a CLIP text encoder, but `fsr_config.text_encoder_config` is '
                'None. Export the checkpoint with `text_encoder=`, or set `relevance` to "none".'
            )
        self.post_init()

    def run_clip_tower(
        self,
        pixel_values: torch.Tensor,
        rows: list[int],
        query: torch.Tensor | None,
        layer: int | None,
        strategy,
        **kwargs,
    ):
        """
        Run the stock `get_image_features` and score its patches.

        Args:
            pixel_values (`torch.FloatTensor`):
                As `get_image_features` takes it.
            rows (`list[int]`):
                Row of the prompt of each view that the tower sees.
            query (`torch.FloatTensor` of shape `(batch, projection_dim)`, *optional*):
                The questions, from [`~CLIPRelevance.encode_query`].
            layer (`int`, *optional*), strategy (`str`, *optional*):
                `vision_feature_layer` and `vision_feature_select_strategy` of this call.
            kwargs:
                What else `get_image_features` takes.

        Returns:
            The stock output; saliency `(views, patches)`; and relevance `(views, patches)`, higher for what is more
            relevant, or `None` without a query.
        """
        layer = self.config.vision_feature_layer if layer is None else layer
        check_clip_tower(self.config, layer, strategy or "default")
        tower = self.model.vision_tower
        layer %= tower.config.num_hidden_layers + 1
        penultimate = tower.config.num_hidden_layers - 1
        outputs = self.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=layer,
            output_hidden_states=[layer - 1, layer, penultimate],
            return_dict=True,
            **kwargs,
        )
        saliency = cls_attention(tower.encoder.layers[layer - 1], outputs.hidden_states[layer - 1])
        if query is None:
            return outputs, saliency, None
        with torch.no_grad():
            patches = tower.post_layernorm(outputs.hidden_states[penultimate][:, 1:])
        relevance = self.text_encoder(patches, query[torch.tensor(rows).to(query.device, non_blocking=True)])
        return outputs, saliency, -relevance if self.config.fsr_config.invert_relevance else relevance


def check_clip_tower(config: PreTrainedConfig, layer, strategy) -> None:
    """
    Raises:
        `ValueError`: for a tower or a choice of features that has no row of [CLS] over the tokens.
    """
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise ValueError(
            f'`vision_config.model_type="{tower}"` is not supported: FSR reads saliency from the [CLS] token of a '
            'CLIP tower ("clip_vision_model") in this family.'
        )
    if not isinstance(layer, int) or layer in (0, -1 - config.vision_config.num_hidden_layers):
        raise ValueError(
            f"`vision_feature_layer={layer!r}` is not supported: FSR needs one int that names the output of a block "
            "(0 is that of none), since saliency is the attention of that block."
        )
    if strategy != "default":
        raise ValueError(
            f'`vision_feature_select_strategy="{strategy}"` is not supported: with it [CLS] is one of the tokens, and '
            'FSR ranks patches by the attention of [CLS]. Use "default".'
        )
