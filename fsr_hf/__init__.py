"""
Focus-Scan-Refine visual-token pruning for vision-language models of transformers.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoModelForMultimodalLM` and `AutoProcessor`, and makes whatever they save carry its code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration.configuration_fsr import FSRConfig
from .configuration.configuration_fsr_llava import FSRLlavaConfig
from .configuration.configuration_fsr_llava_next import FSRLlavaNextConfig
from .configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from .configuration.configuration_fsr_qwen2_5_vl import FSRQwen2_5_VLConfig
from .configuration.configuration_fsr_qwen3_vl import FSRQwen3VLConfig
from .configuration.remote_code import RemoteCodeMixin
from .hub.export import export
from .hub.families import FAMILIES
from .hub.flatten import write_remote_code
from .modeling.fsr import VisualSelection, select_visual_tokens
from .modeling.modeling_fsr_llava import FSRLlavaForConditionalGeneration, FSRLlavaModel
from .modeling.modeling_fsr_llava_next import FSRLlavaNextForConditionalGeneration, FSRLlavaNextModel
from .modeling.modeling_fsr_llava_video import FSRLlavaVideoForConditionalGeneration, FSRLlavaVideoModel
from .modeling.modeling_fsr_qwen2_5_vl import FSRQwen2_5_VLForConditionalGeneration, FSRQwen2_5_VLModel
from .modeling.modeling_fsr_qwen3_vl import FSRQwen3VLForConditionalGeneration, FSRQwen3VLModel
from .processing.processing_fsr_llava import FSRLlavaProcessor
from .processing.processing_fsr_llava_next import FSRLlavaNextProcessor
from .processing.processing_fsr_llava_video import FSRLlavaVideoProcessor
from .version import __version__


__all__ = [
    "FSRConfig",
    "FSRLlavaConfig",
    "FSRLlavaForConditionalGeneration",
    "FSRLlavaModel",
    "FSRLlavaNextConfig",
    "FSRLlavaNextForConditionalGeneration",
    "FSRLlavaNextModel",
    "FSRLlavaNextProcessor",
    "FSRLlavaProcessor",
    "FSRLlavaVideoConfig",
    "FSRLlavaVideoForConditionalGeneration",
    "FSRLlavaVideoModel",
    "FSRLlavaVideoProcessor",
    "FSRQwen2_5_VLConfig",
    "FSRQwen2_5_VLForConditionalGeneration",
    "FSRQwen2_5_VLModel",
    "FSRQwen3VLConfig",
    "FSRQwen3VLForConditionalGeneration",
    "FSRQwen3VLModel",
    "VisualSelection",
    "__version__",
    "export",
    "select_visual_tokens",
]

RemoteCodeMixin._write_remote_code = write_remote_code
for _family in FAMILIES:
    AutoConfig.register(_family.config.model_type, _family.config, exist_ok=True)
    for _auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _auto.register(_family.config, _family.model, exist_ok=True)
    if _family.processor is not None:
        AutoProcessor.register(_family.config, _family.processor, exist_ok=True)
