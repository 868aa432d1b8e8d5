"""The kernels of encoding and reconstructing compile for the GPUs that they are meant for."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

#: Shared memory that a block can have.
SHARED = {80: 163, 89: 99, 90: 227}


def compile_for(kernel, capability, arguments, constants, aligned=(), **options):
    """Compile for a compute capability; pointers, and the numbers named, are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **{name: None for name, kind in arguments.items() if kind is None}}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else arguments[name]
        if signature[name].startswith("*") or name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def pointers(**kinds):
    """Return pointer types by name from words of names."""
    return {name: f"*{kind}" for kind, names in kinds.items() for name in names.split()}


def coefficients(dim, rank, source="bf16"):
    arguments = pointers(
        fp16="latents latent_map analysis columns inputs", fp32="key_offset value_offset", i32="first_columns"
    )
    arguments |= pointers(**{source: "keys values"})
    if not rank:
        arguments |= {"latents": None, "latent_map": None}
    arguments |= {"key_unit": "fp32", "value_unit": "fp32"}
    numbers = ("row_columns", "row_inputs", "levels")
    constants = {
        "HEADS": 8,
        "DIM": dim,
        "RANK": rank,
        "BLOCKS": dim // 64,
        "PREDICTS": True,
        "LIMIT": 65504.0,
    }
    return arguments | dict.fromkeys(numbers, "i32"), constants, numbers


def quantise(keys):
    import triton.language as tl

    arguments = pointers(
        fp32="coded rest table scales next_offset key_excess excess",
        i32="fields",
        u8="records",
        fp16="columns inputs latents innovation transition following",
    )
    of_keys = ("inputs", "latents", "innovation", "transition", "next_offset", "following")
    arguments |= dict.fromkeys(("key_excess",) if keys else of_keys, None)
    numbers = ("row_columns", "row_inputs", "record_bytes")
    arguments |= dict.fromkeys((*numbers, "coefficients", "num_fields"), "i32")
    constants = {
        "RANK": 64 if keys else 0,
        "WIDTH": 64 if keys else 0,
        "STORE_LEVELS": keys,
        "GUARDED": True,
        "MERGE": not keys,
        "TOKENS": 32,
        "TYPE": tl.float16,
        "TAIL": 80,
    }
    return arguments, constants, numbers


def keys(dim, rank, kind):
    arguments = pointers(
        u8="pages", fp16="latents", i32="fields first_fields", fp32="gains scales offset"
    ) | pointers(**{kind: "synthesis latent_map keys inputs"})
    numbers = ("record_bytes", "row_inputs", "columns")
    constants = {"HEADS": 8, "DIM": dim, "RANK": rank, "PREDICTS": True, "WIDE": False, "TAIL": 80}
    return arguments | dict.fromkeys(numbers, "i32"), constants, numbers


def levels():
    arguments = pointers(u8="pages", i32="fields", fp32="gains scales", bf16="inputs")
    numbers = ("record_bytes", "row_inputs", "column")
    return arguments | dict.fromkeys((*numbers, "num_fields"), "i32"), {"FIELDS": 8, "TAIL": 80}, numbers


def grid(width, dim):
    arguments = pointers(u8="words", fp16="scales", fp32="points", bf16="out")
    numbers = ("tokens", "num_codes", "row_bytes", "groups", "codes_per_group")
    constants = {"WIDTH": width, "DIM": dim, "TOKENS": 8, "CODES": 128}
    return arguments | dict.fromkeys(numbers, "i32"), constants, ()


def kernels():
    from aquakv.kernels.encode.triton import coefficients_kernel, quantise_kernel
    from aquakv.kernels.reconstruct.triton import grid_kernel, keys_kernel, levels_kernel

    yield coefficients_kernel, coefficients(128, 64), 4
    yield coefficients_kernel, coefficients(64, 0, "fp32"), 4
    yield coefficients_kernel, coefficients(256, 16), 8
    yield quantise_kernel, quantise(keys=True), 4
    yield quantise_kernel, quantise(keys=False), 4
    yield keys_kernel, keys(128, 64, "bf16"), 4
    yield keys_kernel, keys(256, 16, "fp16"), 8
    yield levels_kernel, levels(), 4
    yield grid_kernel, grid(6, 2), 4
    yield grid_kernel, grid(5, 1), 4


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile(capability):
    for kernel, (arguments, constants, aligned), warps in kernels():
        compiled = compile_for(
            kernel, capability, arguments, constants, aligned, num_warps=warps, num_stages=1
        )
        assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
        assert compiled.metadata.shared <= SHARED[capability] * 1024
