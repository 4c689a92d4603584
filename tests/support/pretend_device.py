"""Notices, on a CPU, what would make the host wait for a GPU.

Some tensors are said to lie on a device: those of an engine, whatever is made from them, and what
:mod:`aptserve_worker.transfer` copies there. Reading a value of one, asking for something whose
shape depends on values, and using one together with a tensor of the host all fail. A tensor that is
made with a named device may be either's. Inside of kernels nothing is looked at: they run on the
device as a whole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from aptserve_worker import transfer
from aptserve_worker.engine import ModelEngine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_READS = {
    "tolist",
    "item",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "__array__",
}
_SHAPE_BY_VALUE = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
_TO_DEVICE = {"to", "cuda", "tensor", "as_tensor"}


class WaitsForDeviceError(AssertionError):
    """Something that a GPU would have to be waited for."""


class PretendDevice:
    """The storages that are said to lie on the device."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._of_either: dict[int, torch.UntypedStorage] = {}
        self._num_kernels_running = 0

    @classmethod
    def of(cls, engine: ModelEngine) -> PretendDevice:
        """All that exists, except for the engine's tables, which are the host's."""
        device = cls()
        host = {_key(table) for table in engine._tables._tables.values()}
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        for tensor in tensors:
            if tensor.layout is torch.strided and _key(tensor) not in host:
                device.put(tensor)
        return device

    def put(self, tensor: Tensor) -> Tensor:
        """Say that a tensor lies there."""
        self._storages[_key(tensor)] = tensor.untyped_storage()
        return tensor

    def has(self, tensor: Tensor) -> bool:
        """Whether it lies there."""
        return _key(tensor) in self._storages

    def put_either(self, tensor: Tensor) -> None:
        """Say that a tensor lies there or on the host."""
        self._of_either[_key(tensor)] = tensor.untyped_storage()

    def may_have(self, tensor: Tensor) -> bool:
        """Whether it may lie there."""
        return _key(tensor) in self._storages or _key(tensor) in self._of_either

    @property
    def is_watched(self) -> bool:
        """Whether no kernel is running."""
        return self._num_kernels_running == 0

    @contextmanager
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Fail, while the context is open, with what the host would wait for."""
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "_staged", lambda host, _: self.put(host.clone()))
            launch = interpreter.GridExecutor.__call__

            def in_kernel(*args: Any, **kwargs: Any) -> Any:
                self._num_kernels_running += 1
                try:
                    return launch(*args, **kwargs)
                finally:
                    self._num_kernels_running -= 1

            patch.setattr(interpreter.GridExecutor, "__call__", in_kernel)
            with _Operations(self), _Calls(self):
                yield


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Calls(TorchFunctionMode):
    """Looks at what Python code calls."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._device.is_watched:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = _tensors((args, kwargs))
        on_device = any(self._device.has(t) for t in tensors)
        if name in _READS and on_device:
            raise WaitsForDeviceError(f"{name} of a tensor on the device")
        named = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        if name in _TO_DEVICE and named and not on_device:
            raise WaitsForDeviceError(f"{name} copies from ordinary memory")
        result = func(*args, **kwargs)
        if named and not tensors and isinstance(result, Tensor):
            self._device.put_either(result)
        return result


class _Operations(TorchDispatchMode):
    """Looks at what is computed."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._device.is_watched:
            return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        if not any(self._device.has(t) for t in tensors):
            result = func(*args, **kwargs)
            if any(self._device.may_have(t) for t in tensors):
                for tensor in _tensors(result):
                    self._device.put_either(tensor)
            return result
        name = func.overloadpacket.__name__
        if name in _SHAPE_BY_VALUE or (name.startswith("index") and _has_mask(args)):
            raise WaitsForDeviceError(f"{func} of a tensor on the device")
        if any(t.dim() and not self._device.may_have(t) for t in tensors):
            raise WaitsForDeviceError(f"{func} of tensors on the device and on the host")
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._device.put(tensor)
        return result


def _has_mask(args: Sequence[Any]) -> bool:
    """Whether an index is one of booleans."""
    return len(args) > 1 and any(t.dtype is torch.bool for t in _tensors(args[1]))
