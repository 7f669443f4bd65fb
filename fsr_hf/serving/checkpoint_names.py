"""From the names of weights in a checkpoint to those of the served model."""

from collections.abc import Callable, Iterable


__all__ = ["make_rename"]

# Names of original checkpoints of LLaVA-Video.
_ORIGINAL_NAMES = {
    "vision_tower.vision_tower.": "vision_tower.",
    "mm_projector.0.": "multi_modal_projector.linear_1.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
}
_TOWER = ("vision_tower.", "multi_modal_projector.", "text_encoder.", "visual.", "image_newline")


def make_rename(tower_names: Iterable[str]) -> Callable[[str], str | None]:
    """
    From a name in a checkpoint, of transformers 4 or 5 or of LLaVA-Video's own code, to the name here. `None` for a
    part of the tower that the served model does not have, such as what stands behind its last block.
    """
    own = set(tower_names)

    def rename(name: str) -> str | None:
        name = name.removeprefix("model.")
        for old, new in _ORIGINAL_NAMES.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        # transformers 5 saves towers without this level, and may build them with or without it.
        for variant in (name, name.replace("vision_model.", "", 1), name.replace("tower.", "tower.vision_model.", 1)):
            if variant in own:
                return f"tower.{variant}"
        if name.startswith(_TOWER):
            return None
        name = name.removeprefix("language_model.").removeprefix("model.")
        return f"language_model.{name}" if name.startswith("lm_head.") else f"language_model.model.{name}"

    return rename
