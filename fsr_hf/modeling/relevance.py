"""Relevance (Eq. 2): patches against the question in CLIP's joint space."""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, normalize
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .offload import sharded_params_gathered
from .precision import without_autocast


__all__ = ["NO_TEXT_ENCODER", "CLIPRelevance", "TextEncoderMixin", "mean_of_neighbours", "patch_values"]

NO_TEXT_ENCODER = (
    '`fsr_config.relevance="{}"` needs a CLIP text encoder, and this model has none: set it to "none". (A LLaVA-1.5 '
    "or LLaVA-NeXT is exported with one by `text_encoder=`.)"
)


class CLIPRelevance(nn.Module):
    """
    The text side of the CLIP that a vision tower of this width came from, and both projections into their joint space.
    It is frozen: it stays in eval mode, its parameters never require a gradient, and it runs without autograd.
    """

    def __init__(self, config: CLIPTextConfig, vision_hidden_size: int):
        super().__init__()
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision_hidden_size, config.projection_dim, bias=False)
        self.chunk_length = config.max_position_embeddings
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "CLIPRelevance":
        # Loading resets `requires_grad`, and ends with `eval()`; so do trainers before a step.
        self.requires_grad_(False)
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "CLIPRelevance":
        return super().requires_grad_(False)

    @torch.no_grad()
    def encode_query(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, less_empty: bool = False
    ) -> torch.Tensor:
        """
        The questions as `(batch, projection_dim)`, float32: the mean over chunks of unit vectors, so that its product
        with a unit vector is the mean cosine; zeros for a row without a chunk. The ids `(batch, chunks * 77)` are
        chunks of the text tower's length, each with its own BOS and EOS; one whose mask is 0 throughout is skipped.
        With `less_empty`, less the unit vector of a text without a word: the product is the mean cosine less the
        cosine to that.
        """
        chunks = input_ids.unflatten(1, (-1, self.chunk_length))  # [B, chunks, 77]
        lengths = attention_mask.unflatten(1, (-1, self.chunk_length)).sum(-1, keepdim=True)  # [B, chunks, 1]
        is_real, texts = lengths > 0, chunks.flatten(0, 1)
        if less_empty:
            # BOS and EOS of the longest chunk. (Configs of `openai/clip-*` name other ids.)
            longest = lengths.flatten().argmax(0, keepdim=True)
            chunk = texts.index_select(0, longest)
            end = chunk.gather(1, (lengths.flatten()[longest, None] - 1).clamp(min=0))
            texts = torch.cat([texts, torch.cat([chunk[:, :1], end.expand(-1, self.chunk_length - 1)], dim=1)])
        # No mask: attention is causal, and the pooled token, the first EOS, sees no padding.
        with sharded_params_gathered(self):
            pooled = self.text_projection(self.text_model(input_ids=texts).pooler_output)
        embeds = normalize(pooled.float(), dim=-1)
        if less_empty:
            embeds = embeds[:-1] - embeds[-1:]
        embeds = embeds.unflatten(0, chunks.shape[:2])
        return embeds.where(is_real, 0).sum(1) / is_real.sum(1).clamp(min=1)

    @torch.no_grad()
    def forward(self, patches: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """
        The cosine of each patch and the question (Eq. 2), not inverted: `(batch, num_patches)`, float32. The patches
        `(batch, num_patches, vision_hidden_size)` come from the vision tower's `post_layernorm`, `query`, a row for
        each image, from [`~CLIPRelevance.encode_query`].
        """
        embeds = self.embed_patches(patches)
        with without_autocast(embeds.device):
            return (embeds @ query.to(embeds.device)[..., None])[..., 0]

    def embed_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches as above to unit vectors of the joint space, `(batch, num_patches, projection_dim)`, float32."""
        return normalize(self.visual_projection(patches).float(), dim=-1)


def patch_values(block: CLIPEncoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    What each patch hands to [CLS] in a block of a CLIP vision tower, apart from the weight of attention: its value,
    through the output projection. From the input of the block, `(batch, 1 + num_patches, hidden_size)`:
    `(batch, num_patches, hidden_size)`.

    The contrastive loss compares [CLS] alone with a text, so in the last block this is the one way on which a patch
    was ever compared with one; its own state was not. (MaskCLIP, arXiv 2112.01071, reads patches so for segmentation.)
    """
    attention = block.self_attn
    with sharded_params_gathered(block, attention):
        return attention.out_proj(attention.v_proj(block.layer_norm1(hidden_states[:, 1:])))


def mean_of_neighbours(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    The mean over the 3 x 3 patches around each, at the border over those that exist. `values` are those of views of
    `height * width` patches, `(views, num_patches)` or `(views, num_patches, size)`.
    """
    maps = values.reshape(len(values), height, width, -1).movedim(-1, 1)
    maps = avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    return maps.movedim(1, -1).reshape(values.shape)


class TextEncoderMixin(PreTrainedModel):
    """What inner and outer model do for the CLIP text tower: it never loads at random, and never trains."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As the stock method; a checkpoint without the weights of the text tower that its config names is refused."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        lost = [key for key in lost if "text_encoder." in key]
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} weights of the CLIP text encoder of its config, or has them in "
                f"another shape ({lost[0]}, ...): relevance would be random. Export it with `text_encoder=`, or load "
                'it with `fsr_config={"text_encoder_config": None}`.'
            )
        return (model, info) if output_loading_info else model

    def requires_grad_(self, requires_grad: bool = True):
        super().requires_grad_(requires_grad)
        text_encoder = getattr(self.base_model, "text_encoder", None)
        if text_encoder is not None:
            text_encoder.requires_grad_(False)
        return self
