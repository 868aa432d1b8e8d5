"""Compile CUDA sources at run time with NVRTC, which PyTorch brings along, and launch them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.errors import ConfigError

_ARCHITECTURE = "sm_90a"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_lock = threading.Lock()


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def wgmma_function(name: str, columns: int) -> str:
    """Return a device function: an asynchronous product, 64 by ``columns``, 16 deep, left in registers."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
DEVICE void {name}(float (&d)[{count}], const u32 (&a)[4], u64 right, bool add) {{
    asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{sums}}}, {{{left}}}, %{count + 4}, "
        "add, 1, 1, 0;\\n}}"
        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(int(add)));
}}
"""


def source_of(name: str, constants: Mapping[str, int], products: Mapping[str, int]) -> str:
    """Return a kernel's whole source: constants, what kernels share, products by columns, the kernel."""
    here = files("aquakv.kernels.hopper")
    lines = [f"#define {key} {value}" for key, value in constants.items()]
    lines.append("#define INFINITY __int_as_float(0x7F800000)")
    shared = here.joinpath("common.cuh").read_text()
    functions = [wgmma_function(key, columns) for key, columns in products.items()]
    return "\n".join([*lines, shared, *functions, here.joinpath(f"{name}.cu").read_text()])


def compile_source(source: str, name: str, architecture: str = _ARCHITECTURE) -> tuple[bytes, str]:
    """Compile a source to a binary for the GPU; return it and the compiler's remarks.

    Raises
    ------
    ConfigError
        NVRTC cannot be found.
    RuntimeError
        The source does not compile (a defect of this package), with the compiler's messages.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _require(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    )
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    remarks = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0\n")
    if status:
        raise RuntimeError(f"kernel {name} does not compile:\n{remarks}")
    binary = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary, remarks


class Kernel:
    """A compiled kernel, loaded on one device.

    Parameters
    ----------
    name
        The source's name without its ending; its function is ``{name}_kernel``.
    constants, products
        As for `source_of`.
    shared_bytes
        Most dynamic shared memory of a launch.
    device
        Index of the CUDA device.
    """

    def __init__(
        self,
        name: str,
        constants: Mapping[str, int],
        products: Mapping[str, int],
        shared_bytes: int,
        device: int,
    ) -> None:
        self.name = name
        binary, self.remarks = compile_source(source_of(name, constants, products), name)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._binary = ctypes.create_string_buffer(binary, len(binary))
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # the device's context exists from now on
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), self._binary))
            entry = f"{name}_kernel".encode()
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, entry))
            self._check(self._driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes))

    def __call__(
        self,
        grid: tuple[int, int],
        block: int,
        shared_bytes: int,
        arguments: Sequence[Tensor | int | float | None],
        dependent: bool = False,
    ) -> None:
        """Launch on the current stream.

        Tensors are passed as pointers (None as a null pointer), ints as 32-bit ints, floats as 32-bit floats.
        ``dependent`` lets it start before the kernel ahead of it on the stream has ended; it waits by itself.
        """
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif argument is None:
                values.append(ctypes.c_void_p(0))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(ctypes.c_int(argument))
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, 1, b"")
        launch = _Launch(*grid, 1, block, 1, 1, shared_bytes, torch.cuda.current_stream().cuda_stream)
        launch.attributes, launch.num_attributes = ctypes.pointer(attribute), int(dependent)
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"kernel {self.name}: {(text.value or b'unknown error').decode()} ({status})")


_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel(
    name: str,
    constants: Mapping[str, int],
    products: Mapping[str, int],
    shared_bytes: int,
    device: torch.device,
) -> Kernel:
    """Return a compiled kernel; each combination is compiled once in a process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (name, tuple(sorted(constants.items())), tuple(sorted(products.items())), shared_bytes, index)
    with _lock:
        if key not in _kernels:
            _kernels[key] = Kernel(name, constants, products, shared_bytes, index)
        return _kernels[key]


def nvrtc_path() -> Path | None:
    """Return where NVRTC is, or None: PyTorch's CUDA wheels bring it, in one of two places."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or []) if spec else []:
            found = sorted(Path(place, "lib").glob("libnvrtc.so.*"))
            if found:
                return found[0]
    return None


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    path = nvrtc_path()
    try:
        if path is None:
            return ctypes.CDLL("libnvrtc.so")
        # NVRTC opens its built-in headers by name: they are found if they are loaded already.
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(
            "backend hopper: NVRTC (libnvrtc) was not found; install nvidia-cuda-nvrtc or choose triton"
        ) from error


def _require(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed with status {status}")


def _read(size: Any, content: Any, program: ctypes.c_void_p) -> bytes:
    count = ctypes.c_size_t()
    _require(size(program, ctypes.byref(count)))
    buffer = ctypes.create_string_buffer(count.value)
    _require(content(program, buffer))
    return buffer.raw
