"""The model families, one line each: everything outside a family's own files learns of it here."""

from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..configuration.configuration_fsr_llava import FSRLlavaConfig
from ..configuration.configuration_fsr_llava_next import FSRLlavaNextConfig
from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..configuration.configuration_fsr_qwen2_5_vl import FSRQwen2_5_VLConfig
from ..configuration.configuration_fsr_qwen3_vl import FSRQwen3VLConfig
from ..modeling.modeling_fsr_llava import FSRLlavaForConditionalGeneration
from ..modeling.modeling_fsr_llava_next import FSRLlavaNextForConditionalGeneration
from ..modeling.modeling_fsr_llava_video import FSRLlavaVideoForConditionalGeneration
from ..modeling.modeling_fsr_qwen2_5_vl import FSRQwen2_5_VLForConditionalGeneration
from ..modeling.modeling_fsr_qwen3_vl import FSRQwen3VLForConditionalGeneration
from ..processing.processing_fsr_llava import FSRLlavaProcessor
from ..processing.processing_fsr_llava_next import FSRLlavaNextProcessor
from ..processing.processing_fsr_llava_video import FSRLlavaVideoProcessor
from ..processing.query import QueryProcessorMixin


__all__ = ["FAMILIES", "Family"]


class Family(NamedTuple):
    """The classes of a family, and the `model_type` of the stock checkpoints that it takes."""

    stock_model_type: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin] | None  # None: the stock processor

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(cls for cls in (self.config, self.model, self.processor) if cls is not None)

    @property
    def takes_text_encoder(self) -> bool:
        """Whether a CLIP text tower can be a part of the model: its processor makes the query."""
        return self.processor is not None and issubclass(self.processor, QueryProcessorMixin)

    @property
    def auto_map(self) -> dict[str, str]:
        """Which class of which flat file each Auto class loads; all model classes are the generative one."""
        classes: dict[str, type | None] = {
            "AutoConfig": self.config,
            "AutoModel": self.model,
            "AutoModelForImageTextToText": self.model,
            "AutoModelForMultimodalLM": self.model,  # `transformers serve`
            "AutoProcessor": self.processor,
        }
        return {
            auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
            for auto, cls in classes.items()
            if cls is not None
        }


FAMILIES = (
    Family("llava", FSRLlavaConfig, FSRLlavaForConditionalGeneration, FSRLlavaProcessor),
    Family("llava_next", FSRLlavaNextConfig, FSRLlavaNextForConditionalGeneration, FSRLlavaNextProcessor),
    Family("qwen2_5_vl", FSRQwen2_5_VLConfig, FSRQwen2_5_VLForConditionalGeneration, None),
    Family("qwen3_vl", FSRQwen3VLConfig, FSRQwen3VLForConditionalGeneration, None),
    Family("llava_onevision", FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration, FSRLlavaVideoProcessor),
)
