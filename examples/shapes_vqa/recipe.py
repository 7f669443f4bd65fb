"""Sizes and lengths of a training run."""

from dataclasses import dataclass

from fsr_hf.testing.small_llava import SmallLlava


__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """
    Everything that a run depends on, besides its seed. The default trains on two CPU cores.

    The towers have LLaVA-1.5's structure: [CLS] and patches, features from the last block but one, a projector of two
    layers. Steps are optimizer steps; `warmup` of each stage is a twentieth of them.
    """

    image_size: int = 144
    patch_size: int = 12
    num_scenes: int = 60_000
    # CLIP
    vision_width: int = 192
    vision_layers: int = 6
    text_width: int = 128
    text_layers: int = 2
    projection_dim: int = 128
    crop_batch: int = 256
    crop_steps: int = 2_000  # on windows of a quarter of the picture
    close_steps: int = 2_000  # on close-ups of objects that differ in little
    scene_batch: int = 128
    scene_steps: int = 300  # on whole pictures
    clip_learning_rate: float = 1.2e-3
    # LLaVA
    width: int = 256
    intermediate: int = 416
    layers: int = 6
    sequence: int = 352  # a picture and as many questions as fit
    answer_batch: int = 32
    answer_steps: int = 5_000
    learning_rate: float = 1.2e-3
    # On pictures that lack tokens: the cosine would last for `dropped_horizon` steps, the last `dropped_cooldown` of
    # `dropped_steps` end it early.
    dropped_steps: int = 500
    dropped_horizon: int = 900
    dropped_cooldown: int = 150
    dropped_learning_rate: float = 6e-4
    dropped_share: float = 0.7  # of these weights in the result; the rest is those before

    @property
    def size(self) -> SmallLlava:
        return SmallLlava(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.width,
            num_layers=self.layers,
            vision_hidden_size=self.vision_width,
            vision_num_layers=self.vision_layers,
            text_hidden_size=self.text_width,
            text_num_layers=self.text_layers,
            projection_dim=self.projection_dim,
        )

    @property
    def num_patches(self) -> int:
        return self.size.num_patches


RECIPES = {
    "cpu": Recipe(),
    # As many visual tokens as LLaVA-1.5 has, and longer.
    "gpu": Recipe(
        image_size=288,
        crop_batch=512,
        crop_steps=6_000,
        close_steps=6_000,
        scene_batch=256,
        scene_steps=2_000,
        sequence=768,
        answer_batch=64,
        answer_steps=8_000,
        dropped_steps=3_000,
        dropped_horizon=5_400,
        dropped_cooldown=900,
    ),
}
