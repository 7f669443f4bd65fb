"""Names of weights in checkpoints that were made before transformers 4.52, as most on the Hub were."""

__all__ = ["old_llava_key", "old_qwen_key"]


def old_llava_key(key: str) -> str:
    """The name of a weight of LLaVA or LLaVA-NeXT."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if key.startswith(new):
            return old + key.removeprefix(new)
    raise AssertionError(key)


def old_qwen_key(key: str) -> str:
    """The name of a weight of Qwen2.5-VL."""
    if key.startswith("model.visual."):
        return key.removeprefix("model.")
    return key.replace("model.language_model.", "model.")
