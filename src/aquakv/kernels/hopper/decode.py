"""Launch the Hopper kernels: scores, next latents, sums of codes, output."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from aquakv.kernels.hopper.compiler import kernel
from aquakv.kernels.hopper.operands import HopperOperands
from aquakv.kernels.hopper.order import SUM_TEAMS
from aquakv.kernels.launch import multiprocessors
from aquakv.kernels.pages import PAGE_TOKENS

#: Most shared memory of a block.
MAX_BLOCK_BYTES = 227 * 1024

_SCORE_TEAMS = 3  # warpgroups of a block of scores
_FIELD_BYTES = 32
_CHUNK_BYTES = 64
_CHUNKS_AHEAD = 2  # of a table's end
_LATENT_TEAMS, _MAX_LATENT_STAGES, _MAX_SUM_STAGES = 4, 8, 6
_SUM_BUFFERS = 3  # of a page's weights
_COMBINED_BYTES = 64 * 1024  # of a block's rows
_LOG2_E = 1.4426950408889634
_QUERY_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_finished: dict[tuple[int, int, int], Tensor] = {}
_lock = threading.Lock()


def scores(
    query: Tensor,
    key_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    latents: Tensor | None,
    operands: HopperOperands,
    page_turns: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return scores and their maxima, times log2 e.

    Returns
    -------
    scores
        ``[rows, pages, query_heads, 64]`` float32.
    maxima
        ``[rows, query_heads, splits]`` float32.
    """
    plain = operands.plain
    rows, query_heads, dim = query.shape
    num_pages, heads, rank = table.shape[1], plain.num_kv_heads, plain.latent_width
    fast = 2 * operands.fast_pairs
    fields = operands.head_fields
    shared = score_shared_bytes(operands)
    constants = {
        "KV_HEADS": heads,
        "GROUP": query_heads // heads,
        "DIM": dim,
        "FAST": fast,
        "SLOW": 2 * operands.slow_pairs,
        "FIELDS": fields,
        "PLANES": operands.score_planes.shape[1],
        "CUBIC": operands.cubic_fields,
        "EXACT": operands.exact_fields,
        "LOADS": operands.plane_loads,
        "RANK": rank,
        "TEAMS": _SCORE_TEAMS,
        "QUERY": _QUERY_KINDS[query.dtype],
        "SOFTCAP": int(softcap is not None),
        "DEPENDENT": 1,
    }
    run = kernel(
        "scores", constants, {"wgmma_64": 64, "wgmma_columns": fast, "wgmma_8": 8}, shared, query.device
    )
    blocks = splits_in_one_round(query.device, rows * heads, -(-num_pages // _SCORE_TEAMS))
    splits = _SCORE_TEAMS * blocks
    out = torch.empty(rows, num_pages, query_heads, PAGE_TOKENS, dtype=torch.float32, device=query.device)
    maxima = torch.empty(rows, query_heads, splits, dtype=torch.float32, device=query.device)
    run(
        (heads * blocks, rows),
        128 * _SCORE_TEAMS,
        shared,
        [
            query,
            key_pages,
            table,
            lengths,
            latents,
            operands.score_images,
            operands.score_offsets,
            operands.score_fields,
            operands.score_planes,
            operands.pair_order,
            operands.pair_angles,
            page_turns,
            operands.offset_turns,
            out,
            maxima,
            key_pages.shape[1],
            num_pages,
            splits,
            float(scaling) if softcap else float(scaling) * _LOG2_E,
            float(softcap or 1.0),
        ],
        dependent=True,
    )
    return out, maxima


def score_shared_bytes(operands: HopperOperands) -> int:
    """Return the shared memory that `scores` needs; `Shared`, `Own` and `Rest` of scores.cu say for what."""
    fast = 2 * operands.fast_pairs
    rank = operands.plain.latent_width
    blocks = -(-(operands.head_fields + rank // 16) // 4)
    images = blocks * (fast // 8 + 8) * 1024 + fast // 16 * 2048
    pairs = operands.fast_pairs + operands.slow_pairs
    warp = -(-(16 * rank * 2 + (operands.score_planes.shape[1] * 16 + 2) * 16) // 128) * 128
    own = 8 * blocks * 1024 + 9 * (-(-fast // 64) * 1024 + 64) + 8 * pairs * 8
    own = -(-(-(-own // 128) * 128 + 4 * warp) // 1024) * 1024
    rest = (4 * operands.fast_pairs + 8 * operands.slow_pairs) * 8 + 1024
    rest += operands.head_fields * _FIELD_BYTES + fast * 2 + 8
    return images + _SCORE_TEAMS * own + rest


def empty_latents(table: Tensor, operands: HopperOperands) -> Tensor:
    """Return room for the next layer's latents."""
    rows, num_pages = table.shape
    width = operands.plain.next_width
    return torch.empty(rows, num_pages * PAGE_TOKENS, width, dtype=torch.float16, device=table.device)


def next_latents(
    key_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    latents: Tensor | None,
    operands: HopperOperands,
    beside: Tensor | None = None,
) -> Tensor:
    """Return the next layer's latents, ``[rows, pages * 64, next_width]`` float16.

    Parameters
    ----------
    beside
        Where to put them, if the launch before this one on the stream is `combine` of the same step: both run
        side by side then. It must be from `empty_latents` before the step's first launch, as memory that was
        freed since may still be in use.
    """
    plain = operands.plain
    rows, num_pages = table.shape
    width, rank = plain.next_width, plain.latent_width
    record = key_pages.shape[1]
    fixed = latent_shared_bytes(operands) - record
    stages = min(_MAX_LATENT_STAGES, (MAX_BLOCK_BYTES - fixed) // (record + 8))
    teams = min(_LATENT_TEAMS, stages)
    stages -= stages % teams
    out = empty_latents(table, operands) if beside is None else beside
    run = kernel(
        "next_latents",
        {"RANK": rank, "WIDTH": width, "LATE": int(beside is not None), "DEPENDENT": 1},
        {"wgmma_width": width},
        MAX_BLOCK_BYTES,
        table.device,
    )
    total = rows * num_pages
    run(
        (min(multiprocessors(table.device), total), 1),
        512,
        fixed + stages * (record + 8),
        [
            key_pages,
            table,
            lengths,
            latents,
            operands.latent_images,
            operands.latent_constants,
            operands.latent_fields,
            out,
            record,
            num_pages,
            total,
            plain.keys.chunks,
            operands.general_chunks,
            stages,
            teams,
            operands.latent_exponent,
        ],
        dependent=True,
    )
    return out


def latent_shared_bytes(operands: HopperOperands) -> int:
    """Return the least shared memory that `next_latents` needs: its matrices and a page."""
    plain = operands.plain
    chunks, width = plain.keys.chunks, plain.next_width
    blocks = chunks + -(-plain.latent_width // 64)
    tables = 8 * width + (chunks + _CHUNKS_AHEAD) * _CHUNK_BYTES
    return blocks * (width * 128 + 8) + tables + 8 + 16 + plain.keys.layout.record_bytes


def code_sums(
    scored: Tensor,
    maxima: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    latents: Tensor | None,
    operands: HopperOperands,
) -> tuple[Tensor, Tensor]:
    """Return the splits' means of codes and latents, and the sums of their weights.

    Returns
    -------
    means
        ``[rows, splits, kv_heads, slots, members]`` float16, query heads of a KV head last.
    totals
        ``[rows, splits, 3, queries]`` float32: weights times key scales, times value scales, alone.
    """
    plain = operands.plain
    rows, num_pages, query_heads, _ = scored.shape
    group = query_heads // plain.num_kv_heads
    queries = -(-query_heads // 8) * 8
    rank = plain.latent_width
    key_tiles, value_tiles = plain.keys.chunks, plain.values.chunks
    most = SUM_TEAMS * (6 if queries <= 32 else 3)  # tiles whose sums fit the registers
    key_slabs, value_slabs = max(1, -(-(key_tiles + 1) // most)), -(-value_tiles // most)
    key_share, value_share = -(-(key_tiles + 1) // key_slabs), -(-value_tiles // max(1, value_slabs))
    tiles = -(-max(key_share, value_share) // SUM_TEAMS)
    record_room = -(-max(key_pages.shape[1], value_pages.shape[1]) // 128) * 128
    stage = record_room + query_heads * PAGE_TOKENS * 4
    # What `Shared` of code_sum.cu has beside its stages and their barriers.
    fixed = 4 * SUM_TEAMS * tiles * _FIELD_BYTES + 8 * queries + 128 * rank
    buffer = 2 * queries * 128 + 128 * rank + 16
    room = MAX_BLOCK_BYTES - fixed - 128
    buffers = _SUM_BUFFERS if room - _SUM_BUFFERS * buffer >= _SUM_BUFFERS * (stage + 8) else 2
    stages = max(buffers, min(_MAX_SUM_STAGES, (room - buffers * buffer) // (stage + 8)))
    shared = -(-(fixed + buffers * buffer + 8 * stages) // 128) * 128 + stages * stage
    run = kernel(
        "code_sum",
        {
            "KV_HEADS": plain.num_kv_heads,
            "GROUP": group,
            "QUERIES": queries,
            "TILES": tiles,
            "CUBIC": max(1, min(tiles, operands.cubic_tiles)),  # with none NVRTC serialises the products
            "RANK": rank,
            "BUFFERS": buffers,
            "STAGES": stages,
            "DEPENDENT": 1,
        },
        {"wgmma_queries": queries},
        MAX_BLOCK_BYTES,
        scored.device,
    )
    slabs = key_slabs + value_slabs
    splits = splits_in_one_round(scored.device, rows * slabs, num_pages)
    slots = (key_tiles + value_tiles) * 64 + rank
    members = -(-group // 2) * 2
    means = torch.empty(
        rows, splits, plain.num_kv_heads, slots, members, dtype=torch.float16, device=scored.device
    )
    totals = torch.empty(rows, splits, 3, queries, dtype=torch.float32, device=scored.device)
    run(
        (slabs * splits, rows),
        128 * (SUM_TEAMS + 1),
        shared,
        [
            scored,
            maxima,
            key_pages,
            value_pages,
            table,
            lengths,
            latents,
            operands.sum_fields,
            means,
            totals,
            key_pages.shape[1],
            value_pages.shape[1],
            record_room,
            num_pages,
            splits,
            maxima.shape[2],
            key_tiles,
            value_tiles,
            key_slabs,
            value_slabs,
            key_share,
            value_share,
        ],
        dependent=True,
    )
    return means, totals


def combine(means: Tensor, totals: Tensor, maxima: Tensor, operands: HopperOperands) -> tuple[Tensor, Tensor]:
    """Return output ``[rows, query_heads, head_dim]`` and log-sum-exp ``[rows, query_heads]``, float32."""
    plain = operands.plain
    rows, splits, heads, slots, members = means.shape
    query_heads = maxima.shape[1]
    group, dim = query_heads // heads, plain.head_dim
    chunk = combined_slots(multiprocessors(means.device), heads, slots)
    chunks = -(-slots // chunk)
    block_rows, shared = combined_rows(rows, splits, members, chunk, dim)
    run = kernel(
        "combine",
        {
            "KV_HEADS": heads,
            "GROUP": group,
            "QUERIES": totals.shape[3],
            "DIM": dim,
            "CHUNK": chunk,
            "DEPENDENT": 1,
        },
        {},
        MAX_BLOCK_BYTES - 1024,  # it has a flag of its own beside that
        means.device,
    )
    row_blocks = -(-rows // block_rows)
    parts = torch.empty(rows, heads, chunks, group, dim, dtype=torch.float32, device=means.device)
    out = torch.empty(rows, query_heads, dim, dtype=torch.float32, device=means.device)
    lse = torch.empty(rows, query_heads, dtype=torch.float32, device=means.device)
    run(
        (chunks * heads, row_blocks),
        32 * max(8, chunk // 16),
        shared,
        [
            means,
            totals,
            maxima,
            operands.epilogue,
            plain.epilogue_offset,
            parts,
            _counters(row_blocks * heads, means.device),
            out,
            lse,
            rows,
            block_rows,
            slots,
            plain.keys.chunks * 64,
            plain.values.chunks * 64,
            splits,
            maxima.shape[2],
        ],
        dependent=True,
    )
    return out, lse


def combined_slots(processors: int, heads: int, slots: int) -> int:
    """Return how many slots a block of `combine` takes: few, yet no multiprocessor has a second block."""
    steps = -(-slots // 16)
    fewest = -(-steps // max(1, processors // heads))
    return 16 * min(max(fewest, 4), 12)


def combined_rows(rows: int, splits: int, members: int, chunk: int, dim: int) -> tuple[int, int]:
    """Return how many rows a block of `combine` takes, and its shared memory: so little that two fit."""
    row = splits * (chunk * members * 2 + 12 * members) + 8 * (2 * chunk + 16) + 4 * members
    most = max(1, _COMBINED_BYTES // row)
    block_rows = -(-rows // -(-rows // most))
    return block_rows, chunk * (2 * dim + 16) + block_rows * row + 16


def splits_in_one_round(device: torch.device, programs: int, pages: int) -> int:
    """Return into how many splits to cut a row's pages so that no multiprocessor has a second block."""
    return max(1, min(pages, multiprocessors(device) // max(1, programs)))


def _counters(count: int, device: torch.device) -> Tensor:
    """Return zeros that the kernel leaves as zeros, one set for every stream."""
    if torch.cuda.is_current_stream_capturing():
        # Nothing is zero before the graph's first replay, so nobody else may have them.
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream, count)
    with _lock:
        if key not in _finished:
            _finished[key] = torch.zeros(count, dtype=torch.int32, device=device)
        return _finished[key]
