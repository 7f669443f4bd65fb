"""LLaVA-1.5 with FSR in vLLM."""

from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_model import FSRServedModel
from .vllm_processing import FSRInfoMixin, FSRMultiModalProcessorMixin


__all__ = ["FSRLlavaForConditionalGeneration"]


class FSRLlavaProcessingInfo(FSRInfoMixin, LlavaProcessingInfo):
    pass


class FSRLlavaMultiModalProcessor(FSRMultiModalProcessorMixin, LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    FSRLlavaMultiModalProcessor, info=FSRLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FSRLlavaForConditionalGeneration(FSRServedModel):
    """`FSRLlavaForConditionalGeneration` as vLLM serves it."""
