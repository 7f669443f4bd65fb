"""
FSR in vLLM: `register` is this package's entry point of the group `vllm.general_plugins`, which vLLM calls in each of
its processes. Nothing here imports vLLM before that.
"""

__all__ = ["register"]

# The class that serves each architecture, by the name of its module here.
_MODULES = {
    "FSRLlavaForConditionalGeneration": "vllm_llava",
    "FSRLlavaNextForConditionalGeneration": "vllm_llava_next",
    "FSRQwen2_5_VLForConditionalGeneration": "vllm_qwen2_5_vl",
    "FSRQwen3VLForConditionalGeneration": "vllm_qwen3_vl",
    "FSRLlavaVideoForConditionalGeneration": "vllm_llava_video",
}


def register() -> None:
    """Make the FSR models known to vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import fsr_hf  # noqa: F401  makes configs and processors known to the Auto classes

    from .vllm_setup import FSRServingConfig, let_cpu_runner_prune

    for architecture, module in _MODULES.items():
        # By name: a process that only takes requests never imports the model.
        ModelRegistry.register_model(architecture, f"{__name__}.{module}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = FSRServingConfig
    let_cpu_runner_prune()
