"""A worker without a model, shipped so that schedulers and clients are tested against the real
protocol: deterministic tokens, exact memory accounting, injectable delay and faults.
"""

from aptserve_worker.fake.engine import FakeEngine, StepGate
from aptserve_worker.fake.faults import Fault, FaultKind
from aptserve_worker.fake.model import FakeModel, byte_tokenizer_json, expected_tokens
from aptserve_worker.fake.worker import FakeWorker

__all__ = [
    "FakeEngine",
    "FakeModel",
    "FakeWorker",
    "Fault",
    "FaultKind",
    "StepGate",
    "byte_tokenizer_json",
    "expected_tokens",
]
