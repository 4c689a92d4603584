"""Which of a machine's GPUs a worker takes when several workers share the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def hide_gpus_of_others(replica: int, num_own: int) -> None:
    """Leave this process and its children the GPUs of worker number ``replica``, ``num_own`` each.

    To be called before anything uses a GPU. Nothing changes where there are none.
    """
    import torch

    named = os.environ.get(_VISIBLE, "")
    count = torch.cuda.device_count()  # asks the driver's library, which wakes no GPU
    names = [name.strip() for name in named.split(",")] if named else map(str, range(count))
    if count:
        os.environ[_VISIBLE] = ",".join(gpus_of(list(names)[:count], replica, num_own))


def gpus_of(names: Sequence[str], replica: int, num_own: int) -> Sequence[str]:
    """The GPUs of one of several workers; they start again from the first when there are too few.

    All of them where they are too few for one worker, which is for it to say.
    """
    num_shares = len(names) // num_own
    if not num_shares:
        return names
    first = replica % num_shares * num_own
    return names[first : first + num_own]
