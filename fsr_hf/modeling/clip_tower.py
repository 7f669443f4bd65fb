"""What LLaVA-1.5 and LLaVA-NeXT share: scores from a CLIP tower and from the text side of its CLIP."""

from typing import Any

import torch

from .compression import FSRModelMixin
from .relevance import CLIPRelevance
from .saliency import cls_attention, resolve_feature_layer


__all__ = ["CLIPTowerMixin", "resolve_clip_layer"]


class CLIPTowerMixin(FSRModelMixin):
    """
    Saliency from the [CLS] row of the selected block, relevance from `text_encoder`, where the config describes one.
    """

    def __init__(self, config):
        resolve_clip_layer(config)
        super().__init__(config)
        text_config = config.fsr_config.text_encoder_config
        if text_config is not None:
            self.text_encoder: Any = CLIPRelevance(text_config, config.vision_config.hidden_size)
        elif config.fsr_config.relevance == "clip":
            raise ValueError(
                '`fsr_config.relevance="clip"` needs a CLIP text encoder, but `fsr_config.text_encoder_config` is '
                'None. Export the checkpoint with `text_encoder=`, or set `relevance` to "none".'
            )
        self.post_init()

    def run_clip_tower(
        self, pixel_values: torch.Tensor, rows: list[int], query: torch.Tensor | None, layer, strategy, **kwargs
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
        layer = resolve_clip_layer(self.config, layer, strategy)
        tower = self.vision_tower
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


def resolve_clip_layer(config: Any, layer: Any = None, strategy: str | None = None) -> int:
    """
    The block, counted from 1, whose output becomes the features, in a call with this `vision_feature_layer` and
    `vision_feature_select_strategy` (by default the config's).

    Raises:
        `ValueError`: for a tower or a choice of features that has no row of [CLS] over the tokens.
    """
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise ValueError(
            f'`vision_config.model_type="{tower}"` is not supported: FSR reads saliency from the [CLS] token of a '
            'CLIP tower ("clip_vision_model") in this family.'
        )
    strategy = strategy or config.vision_feature_select_strategy
    if strategy != "default":
        raise ValueError(
            f'`vision_feature_select_strategy="{strategy}"` is not supported: with it [CLS] is one of the tokens, and '
            'FSR ranks patches by the attention of [CLS]. Use "default".'
        )
    return resolve_feature_layer(config, layer)
