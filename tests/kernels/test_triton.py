"""Triton kernels against their definitions: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from decode_cases import SHAPES, codes_to, make_case
from interpreted import DEVICE, on_this_device

from aquakv.kernels import attend_codes
from aquakv.kernels.combine import combine
from aquakv.kernels.scores import Scores, scores
from aquakv.kernels.weighted_code_sum import weighted_code_sum

pytest.importorskip("triton", reason="needs triton")

# Float16 levels, keys and queries: each coordinate is off by 2^-11 at random. Relative to the largest.
TOLERANCE = 2e-3


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    same = actual == expected
    difference = torch.where(same, 0.0, (actual.double() - expected.double()))
    scale = expected[expected.isfinite()].double().norm()
    return float(difference.norm() / scale.clamp(min=1e-9)) if len(expected) else 0.0


@on_this_device
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_their_definitions(name):
    case = make_case(SHAPES[name], seed=1)
    operands, rotary = case.operands(torch.float16).to(DEVICE), case.rotary(torch.float16)
    rotary = type(rotary)(*(table.to(DEVICE) for table in vars(rotary).values()))
    codes, query = codes_to(case.codes(), DEVICE), case.query.half().to(DEVICE)
    latents = case.stored_latents(operands.latent_width, torch.float16)
    latents = None if latents is None else latents.to(DEVICE)
    options = {"scaling": case.scaling, "softcap": case.shape.softcap}
    step = (query, codes, latents, operands, rotary)
    expected = scores(*step, **options, backend="torch")
    scored = scores(*step, **options, backend="triton")
    assert relative_error(scored.scores, expected.scores) < TOLERANCE
    assert torch.equal(scored.maxima.amax(-1), scored.scores.amax(-1))

    # From here on the same scores for both.
    expected = Scores(scored.scores, scored.scores.amax(-1, keepdim=True))
    reference = weighted_code_sum(expected, codes, latents, operands, backend="torch")
    summed = weighted_code_sum(scored, codes, latents, operands, backend="triton")
    heads = query.shape[1]
    total, normalizers = summed.sums.sum(1)[..., :heads], summed.normalizers.sum(1)[..., :heads]
    latent_slots = operands.keys.slots.new_zeros(operands.latent_width)
    slots = torch.cat([operands.keys.slots, operands.values.slots, latent_slots]) >= 0
    assert relative_error(total[:, slots], reference.sums.sum(1)[:, slots]) < TOLERANCE
    assert relative_error(normalizers, reference.normalizers.sum(1)) < 1e-5

    out, lse = combine(reference, expected.maxima, operands, backend="torch")
    merged, merged_lse = combine(summed, scored.maxima, operands, backend="triton")
    assert relative_error(merged, out) < TOLERANCE
    assert relative_error(merged_lse, lse) < 1e-4

    chain = attend_codes(*step, **options, backend="triton")
    whole = attend_codes(*step, **options, backend="torch")
    assert relative_error(chain.out, whole.out) < 2 * TOLERANCE
    assert relative_error(chain.lse, whole.lse) < TOLERANCE
    if whole.next_latents is not None:
        assert chain.next_latents is not None
        for row, length in enumerate(case.shape.lengths):
            seen = case.scales[0, row, :length].to(DEVICE) != 255
            ours, theirs = chain.next_latents[row, :length][seen], whole.next_latents[row, :length][seen]
            assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_can_be_captured():
    case = make_case(SHAPES["wide heads, group of 4"], seed=2)
    operands, rotary = case.operands(torch.float16).to("cuda"), case.rotary(torch.float16)
    rotary = type(rotary)(*(table.cuda() for table in vars(rotary).values()))
    codes, query = codes_to(case.codes(), "cuda"), case.query.half().cuda()
    latents = case.stored_latents(operands.latent_width, torch.float16)
    step = (query, codes, None if latents is None else latents.cuda(), operands, rotary)
    attend_codes(*step, scaling=case.scaling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_codes(*step, scaling=case.scaling)
    query.copy_(query.flip(0))
    graph.replay()
    again = attend_codes(*step, scaling=case.scaling)
    assert torch.equal(captured.out, again.out)
    assert torch.equal(captured.lse, again.lse)
