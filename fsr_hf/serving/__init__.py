"""
FSR in vLLM: `register` is this package's entry point of the group `vllm.general_plugins`, which vLLM calls in each of
its processes. Nothing here imports vLLM before that.
"""

__all__ = ["register"]


def register() -> None:
    """Make the FSR models known to vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..hub.families import FAMILIES
    from .vllm_setup import FSRServingConfig, let_cpu_runner_prune

    for family in FAMILIES:
        architecture = family.model.__name__
        module = f"vllm_{family.config.model_type.removeprefix('fsr_')}"
        # By name: a process that only takes requests never imports the model.
        ModelRegistry.register_model(architecture, f"{__name__}.{module}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = FSRServingConfig
    let_cpu_runner_prune()
