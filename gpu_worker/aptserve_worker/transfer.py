"""Copies between host and device that nobody waits for.

A plain copy to a GPU, and any look at a tensor that lies there, makes the host wait until the
device has done all it was given. What a step needs is therefore copied through pinned memory, in
the order of the device's stream, and what it gives is fetched by a copy that marks its own end.
torch's allocator of pinned memory gives none of it to another before the copies from and to it are
done, so each copy has memory of its own and nothing has to be kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` as work given to ``device`` from now on sees it; on a CPU the tensor itself."""
    return _staged(host, device).to(device, non_blocking=True)


def copy_to_device(host: Tensor, target: Tensor) -> None:
    """Overwrite ``target``, for work given to its device from now on."""
    target.copy_(_staged(host, target.device), non_blocking=True)


def _staged(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()


@contextmanager
def no_waiting() -> Iterator[None]:
    """RuntimeError, where there is a GPU, from anything that makes the host wait for it.

    To be tried before a CUDA graph is recorded: torch's allocator does not recover from a recording
    that breaks, and fails when it is next to give memory back.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Fetch:
    """Tensors of a device on their way to the host, and with them all that was given to it before.

    On a CPU everything is done at once.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """``tensors`` are what work given so far makes of them; there may be none."""
        self._done: torch.cuda.Event | None = None
        if device.type == "cpu":
            self._tensors = list(tensors)
            return
        self._tensors = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        # Blocking: whoever waits leaves the processor to the thread that prepares the next step.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once they are there; from any thread. Raises what broke on the device."""
        if self._done is not None:
            self._done.synchronize()

    def tensors(self) -> list[Tensor]:
        """The tensors on the host, in the order given; waits for them."""
        self.wait()
        return self._tensors
