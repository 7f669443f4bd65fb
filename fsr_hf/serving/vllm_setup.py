"""What FSR sets in vLLM's own configuration before a model is built."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .request import SETTINGS


__all__ = ["FSRServingConfig", "let_cpu_runner_prune"]

# vLLM rotates by one position per token unless a model says that it has three (M-RoPE).
_AXES = 3
_NUM_AXES_NAME = "mrope_section"
# Rotary embeddings whose table does not depend on its length, so that a longer one holds the same angles.
_PLAIN_ROPE = ("default", "linear", "llama3")


class FSRServingConfig(VerifyAndUpdateConfig):
    """vLLM calls this once, when all options are known and no model is built."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model_config = vllm_config.model_config
        config, mm_config = model_config.hf_config, model_config.multimodal_config
        if mm_config is None:
            return
        check_options(config, mm_config)
        if config.fsr_config.positions != "original":
            return
        # Kept tokens have positions of their own. vLLM asks a model for positions if it has M-RoPE, and lets it change
        # them once its encoder has run if tokens of videos are pruned: the rate is read for nothing else here.
        if not model_config.uses_mrope:
            setattr(config, _NUM_AXES_NAME, [0] * _AXES)
        mm_config.video_pruning_rate = 1e-9


def check_options(config: Any, mm_config: Any) -> None:
    """
    Reject options of vLLM that do not go together with FSR.

    Raises:
        `ValueError`: naming the option, and what to do.
    """
    if mm_config.video_pruning_rate:
        raise ValueError(
            f"`video_pruning_rate={mm_config.video_pruning_rate}` is not supported: FSR prunes videos itself. Set "
            "`retention_ratio` in `--hf-overrides '{\"fsr_config\": {...}}'`."
        )
    if mm_config.enable_mm_embeds:
        raise ValueError(
            "`enable_mm_embeds` is not supported: image embeddings of a client come without scores, so FSR could not "
            "prune them. Send pictures."
        )
    if named := sorted(SETTINGS & (mm_config.mm_processor_kwargs or {}).keys()):
        raise ValueError(
            f"`mm_processor_kwargs` of the server name {', '.join(f'`{name}`' for name in named)}: its budget belongs "
            "into `--hf-overrides '{\"fsr_config\": {...}}'`, and that of a request into its own "
            "`mm_processor_kwargs`."
        )
    text = config.get_text_config()
    has_axes = "mrope_section" in (text.rope_parameters or {})
    rope_type = (text.rope_parameters or {}).get("rope_type", "default")
    if has_axes and config.fsr_config.positions != "original":
        raise ValueError(
            f'`fsr_config.positions="{config.fsr_config.positions}"` is not supported in vLLM for this model: it has '
            'positions of several axes. Leave it at "original".'
        )
    if not has_axes and config.fsr_config.positions == "original" and rope_type not in _PLAIN_ROPE:
        raise ValueError(
            f'`fsr_config.positions="original"` is not supported in vLLM for a language model of `rope_type='
            f'"{rope_type}"`: set `--hf-overrides \'{{"fsr_config": {{"positions": "compact"}}}}\'`.'
        )


def let_cpu_runner_prune() -> None:
    """
    `GPUModelRunner.load_model` notes whether the model may change positions; `CPUModelRunner.load_model`, which
    replaces it, does not (vLLM 0.32 and 0.33). This adds that note.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.load_model
    if hasattr(stock, "is_fsr"):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        mm_config = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            getattr(self.get_model(), "supports_multimodal_pruning", False)
            and mm_config is not None
            and mm_config.is_multimodal_pruning_enabled()
        )

    load_model.is_fsr = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
