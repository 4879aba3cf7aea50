"""The contract between an inference engine and the models that it runs."""

from vllm_traits.backend import CompletedStep, KvCacheBudget, ModelBackend, ModelSpec, StepHandle
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState, TokenLogprobs
from vllm_traits.ids import BlockId, SeqId, SlotId, StepId, TokenId
from vllm_traits.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LAST_SAMPLED",
    "Batch",
    "BatchOutput",
    "BatchState",
    "BlockId",
    "CompletedStep",
    "KvCacheBudget",
    "ModelBackend",
    "ModelSpec",
    "SamplingParams",
    "SeqId",
    "SlotId",
    "StepHandle",
    "StepId",
    "StructuredOutputsParams",
    "TokenId",
    "TokenLogprobs",
]
