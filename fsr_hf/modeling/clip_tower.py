"""What LLaVA-1.5 and LLaVA-NeXT share: scores from a CLIP tower and from the text side of its CLIP."""

from functools import partial
from typing import Any

import torch

from .compression import FSRModelMixin
from .relevance import NO_TEXT_ENCODER, CLIPRelevance, mean_of_neighbours, patch_values
from .saliency import cls_attention, resolve_tower_layer


__all__ = ["CLIPTowerMixin", "resolve_clip_layer"]

resolve_clip_layer = partial(resolve_tower_layer, "clip_vision_model")


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
        elif config.fsr_config.uses_relevance:
            raise ValueError(NO_TEXT_ENCODER.format(config.fsr_config.relevance))
        self.post_init()

    def run_clip_tower(
        self,
        pixel_values: torch.Tensor,
        rows: list[int],
        query: torch.Tensor | None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ):
        """
        Run the stock `get_image_features` on `pixel_values` (and `kwargs`), and score its patches. `rows` are the rows
        of the prompt of each view that the tower sees, `query` the questions, from [`~CLIPRelevance.encode_query`].
        Returns the stock output; saliency `(views, patches)`; and relevance of the same shape, higher for what is more
        relevant, or `None` without a query.
        """
        layer = resolve_clip_layer(self.config, vision_feature_layer, vision_feature_select_strategy)
        tower = self.vision_tower
        penultimate = tower.config.num_hidden_layers - 1
        states = [layer - 1, layer, penultimate]
        outputs = self.get_image_features(
            pixel_values, vision_feature_layer=layer, output_hidden_states=states, return_dict=True, **kwargs
        )
        saliency = cls_attention(tower.encoder.layers[layer - 1], outputs.hidden_states[layer - 1])
        if query is None:
            return outputs, saliency, None
        query = query[torch.tensor(rows).to(query.device, non_blocking=True)]
        fsr = self.config.fsr_config
        states = outputs.hidden_states[penultimate]
        with torch.no_grad():
            patches = patch_values(tower.encoder.layers[-1], states) if fsr.reads_values else states[:, 1:]
            relevance = self.text_encoder(tower.post_layernorm(patches), query)
        if fsr.reads_values:
            height, width = (side // tower.config.patch_size for side in pixel_values.shape[-2:])
            return outputs, saliency, mean_of_neighbours(relevance, height, width)
        return outputs, saliency, -relevance if fsr.invert_relevance else relevance
