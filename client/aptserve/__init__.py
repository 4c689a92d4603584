"""Client SDK of Apt-Serve.

from aptserve import Client

with Client() as client:
    for chunk in client.generate("def fibonacci(n):", max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from aptserve._aio_streams import AsyncGenerateStream, AsyncPlanStream
from aptserve._streams import GenerateStream, PlanStream
from aptserve.aio import AsyncClient
from aptserve.client import Client
from aptserve.errors import (
    AlreadyExistsError,
    AptServeError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from aptserve.sampling import SamplingParams
from aptserve.types import (
    Calibration,
    Chunk,
    Completion,
    FinishReason,
    ModelInfo,
    Objectives,
    PlannedRequest,
    PlanReport,
    PositionLogprobs,
    Status,
    Tier,
    TierSeconds,
    TierStatus,
    Timing,
    TokenCount,
    TokenLogprob,
    Totals,
    Usage,
    WorkerStatus,
)

__all__ = [
    "AlreadyExistsError",
    "AptServeError",
    "AsyncClient",
    "AsyncGenerateStream",
    "AsyncPlanStream",
    "Calibration",
    "CancelledError",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FinishReason",
    "GenerateStream",
    "InternalError",
    "InvalidArgumentError",
    "ModelInfo",
    "NotFoundError",
    "Objectives",
    "PlanReport",
    "PlanStream",
    "PlannedRequest",
    "PositionLogprobs",
    "ProtocolError",
    "ResourceExhaustedError",
    "SamplingParams",
    "Status",
    "Tier",
    "TierSeconds",
    "TierStatus",
    "Timing",
    "TokenCount",
    "TokenLogprob",
    "Totals",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "WorkerStatus",
]
