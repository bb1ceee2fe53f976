"""The CUDA driver, called by ctypes: what a launch costs in Python is most of what a small loss costs."""

from __future__ import annotations

import ctypes
import sys
from functools import cached_property
from typing import Any, NamedTuple

# CUdevice_attribute, CUfunction_attribute, CUlaunchAttributeID, CUresult
_SHARED_OF_A_BLOCK = 97
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 8, 14
_CLUSTER_DIMENSION = 4
_INVALID_CONTEXT = 201

_Pointer = ctypes.c_char_p * 1


class DriverError(RuntimeError):
    """A call of the driver that failed."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel(NamedTuple):
    """A kernel made ready for a device.

    Attributes:
        function: The driver's handle of it.
        threads: Of a block.
        shared: Bytes of shared memory of a block.
        blocks: What a launch has at most: as many as run at once where they are of clusters.
    """

    function: int
    threads: int
    shared: int
    blocks: int


class Driver:
    """The loaded library, or why there is none."""

    def __init__(self) -> None:
        self._contexts: dict[int, int] = {}

    @cached_property
    def missing(self) -> str | None:
        """Why there is no driver, or None."""
        try:
            self._library  # noqa: B018
        except (OSError, AttributeError) as error:
            return f"the CUDA driver does not load: {error}"
        return None

    @cached_property
    def _library(self) -> Any:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        # Without these ctypes takes a handle for an int of 32 bits.
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        library.cuKernelGetFunction.argtypes = [pointer, pointer]
        library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
        library.cuOccupancyMaxActiveClusters.argtypes = [pointer, pointer, pointer]
        library.cuCtxSetCurrent.argtypes = [pointer]
        return library

    @cached_property
    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs."""
        found = ctypes.c_int()
        self._check("cuDriverGetVersion", self._library.cuDriverGetVersion(ctypes.byref(found)))
        return found.value // 1000, found.value % 1000 // 10

    def shared_of_a_block(self, device: int) -> int:
        """Bytes of shared memory that a block may ask for."""
        found = ctypes.c_int()
        status = self._library.cuDeviceGetAttribute(
            ctypes.byref(found), _SHARED_OF_A_BLOCK, self._handle(device)
        )
        self._check("cuDeviceGetAttribute", status)
        return found.value

    def enter(self, device: int) -> None:
        """Makes torch's context of a device this thread's: a thread that is new has none."""
        library, context = self._library, self._contexts.get(device)
        if context is None:
            retained = ctypes.c_void_p()
            status = library.cuDevicePrimaryCtxRetain(ctypes.byref(retained), self._handle(device))
            self._check("cuDevicePrimaryCtxRetain", status)
            context = self._contexts[device] = retained.value or 0
        self._check("cuCtxSetCurrent", library.cuCtxSetCurrent(context))

    def _handle(self, device: int) -> ctypes.c_int:
        found = ctypes.c_int()
        self._check("cuInit", self._library.cuInit(0))
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(found), device))
        return found

    def ready(self, kernel: int, threads: int, shared: int, cluster: int | None) -> Kernel:
        """A kernel (a `CUkernel`) made ready for the current context's device; None: no clusters."""
        library, function = self._library, ctypes.c_void_p()
        self._check("cuKernelGetFunction", library.cuKernelGetFunction(ctypes.byref(function), kernel))
        if cluster is None:
            return Kernel(function.value or 0, threads, shared, 0)
        for attribute, value in ((_MAX_DYNAMIC_SHARED, shared), (_NON_PORTABLE_CLUSTER, 1)):
            status = library.cuFuncSetAttribute(function, attribute, value)
            self._check("cuFuncSetAttribute", status)
        attributes = _Attribute(_CLUSTER_DIMENSION)
        attributes.value[:3] = [cluster, 1, 1]
        config = _LaunchConfig((cluster, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(attributes), 1)
        clusters = ctypes.c_int()
        status = library.cuOccupancyMaxActiveClusters(ctypes.byref(clusters), function, ctypes.byref(config))
        self._check("cuOccupancyMaxActiveClusters", status)
        if clusters.value < 1:
            raise DriverError(
                f"this GPU runs no cluster of {cluster} blocks with {shared:,} bytes of shared memory each; "
                "pass backend='triton'"
            )
        return Kernel(function.value or 0, threads, shared, clusters.value * cluster)

    def launch(self, kernel: Kernel, grid: int, record: bytes, stream: int, device: int) -> None:
        """Starts a kernel of one argument, a record."""
        launch = self._library.cuLaunchKernel
        arguments = (
            kernel.function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, _Pointer(record), None,
        )  # fmt: skip
        status = launch(*arguments)
        if status == _INVALID_CONTEXT:
            self.enter(device)
            status = launch(*arguments)
        if status:
            self._check("cuLaunchKernel", status)

    def _check(self, name: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            raise DriverError(f"{name} failed: {said} (CUDA error {status})")


DRIVER = Driver()
