"""Every kernel compiles for the GPUs that it is meant for, on a machine without one."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def compile_kernel(kernel, capability, arguments, constants, **options):
    """Compile for a compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **{k: None for k, kind in arguments.items() if kind is None}}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else arguments[name]
        signature[name] = POINTERS.get(kind, kind)
        if signature[name].startswith("*") or name.endswith(("record_bytes", "slots", "padded_heads")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def scores_arguments(rank, dim, chunks):
    u8, i32, f16, f32 = torch.uint8, torch.int32, torch.float16, torch.float32
    pointers = {
        "query": f16,
        "pages": u8,
        "table": i32,
        "latents": f16 if rank else None,
        "fields": i32,
        "gains": f16,
        "first_fields": i32,
        "synthesis": f16,
        "latent_synthesis": f16 if rank else None,
        "key_offset": f32,
        "page_cos": f32,
        "page_sin": f32,
        "offset_cos": f16,
        "offset_sin": f16,
        "lengths": i32,
        "scores": f32,
        "maxima": f32,
        "record_bytes": "i32",
        "num_pages": "i32",
        "num_splits": "i32",
        "scaling": "fp32",
        "softcap": "fp32",
    }
    constants = {
        "HEADS": 8,
        "GROUP": 4,
        "GROUP_PAD": 8,
        "DIM": dim,
        "ROTARY": dim,
        "RANK": rank,
        "CHUNKS": chunks,
        "ROWS": 16 * sum(chunks),
        "SOFTCAP": False,
        "ASM": True,
    }
    return pointers, constants


def next_latents_arguments(rank, width):
    u8, i32, f16, f32 = torch.uint8, torch.int32, torch.float16, torch.float32
    pointers = {
        "pages": u8,
        "table": i32,
        "latents": f16 if rank else None,
        "fields": i32,
        "gains": f16,
        "innovation": f16,
        "transition": f16 if rank else None,
        "next_offset": f32,
        "lengths": i32,
        "following": f16,
        "record_bytes": "i32",
        "rows": "i32",
        "num_pages": "i32",
        "num_chunks": "i32",
    }
    return pointers, {"RANK": rank, "WIDTH": width, "PAGES": 2, "ASM": True}


def sum_arguments(rank, chunks):
    u8, i32, f16, f32 = torch.uint8, torch.int32, torch.float16, torch.float32
    pointers = {"scores": f32, "maxima": f32, "latents": f16, "lengths": i32, "sums": f32, "normalizers": f32}
    pointers["table"] = i32
    for kind in ("key", "value"):
        pointers |= {f"{kind}_pages": u8, f"{kind}_fields": i32, f"{kind}_gains": f16}
    numbers = (
        "key_record_bytes",
        "value_record_bytes",
        "num_pages",
        "num_splits",
        "num_maxima",
        "query_heads",
        "key_slabs",
        "code_slabs",
        "key_chunks",
        "value_chunks",
        "slots",
    )
    return pointers | dict.fromkeys(numbers, "i32"), {
        "HEADS": 32,
        "RANK": rank,
        "CHUNKS": chunks,
        "ASM": True,
    }


def merge_arguments():
    pointers = dict.fromkeys(("sums", "normalizers", "maxima", "lse"), torch.float32)
    numbers = ("num_splits", "num_maxima", "query_heads", "padded_heads", "slots")
    return pointers | {"means": torch.float16} | dict.fromkeys(numbers, "i32"), {"HEADS": 32, "SLOTS": 4}


def epilogue_arguments():
    pointers = dict.fromkeys(("lse", "offset", "out"), torch.float32)
    pointers |= dict.fromkeys(("means", "epilogue"), torch.float16)
    constants = {"KV_HEADS": 8, "GROUP": 4, "DIM": 128, "BLOCK": 16, "SLOTS": 128}
    return pointers | dict.fromkeys(("columns", "slots"), "i32"), constants


def kernels(stages):
    from aquakv.kernels.combine.triton import epilogue_kernel, merge_splits_kernel
    from aquakv.kernels.scores.triton import next_latents_kernel, scores_kernel
    from aquakv.kernels.weighted_code_sum.triton import weighted_code_sum_kernel

    yield scores_kernel, *scores_arguments(64, 128, (4, 4)), stages
    yield scores_kernel, *scores_arguments(32, 128, (4, 1)), stages
    yield scores_kernel, *scores_arguments(0, 64, (2,)), stages
    yield next_latents_kernel, *next_latents_arguments(64, 64), 3
    yield weighted_code_sum_kernel, *sum_arguments(64, 4), 1
    yield merge_splits_kernel, *merge_arguments(), 3
    yield epilogue_kernel, *epilogue_arguments(), 4


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile(capability):
    for kernel, arguments, constants, num_stages in kernels(1 if capability == 89 else 2):
        compiled = compile_kernel(kernel, capability, arguments, constants, num_stages=num_stages)
        assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
        # Shared memory of a block: what each of these GPUs has.
        assert compiled.metadata.shared <= (99 if capability == 89 else 163) * 1024
