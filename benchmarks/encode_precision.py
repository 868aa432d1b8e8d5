"""What float16 products do to the codes of the demo model's keys and values, on a CPU.

    python benchmarks/encode_precision.py --data-dir DIR --out benchmarks/results/encode-precision-demo.json

The demo model's own keys and values of text go through all layers of a ``decode`` codec, encoded by the torch
definition with operands in float32, float16 and bfloat16. Of each precision: the share of codes (of tokens of
equal scale) and of scales that differ from float32's, given the same latent from the layer before; and the
mean weighted squared error relative to `LayerCodec`'s own, both as the encoder measures it and of what is
reconstructed from the records, every precision carrying its own latents from layer to layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv import ModelCodec, calibrate, preset
from aquakv.codec import Reconstruction
from aquakv.data import token_sequences
from aquakv.evaluation.results import write_benchmark
from aquakv.kernels import record_planes, record_scales, unpack_pages
from aquakv.kernels.encode import EncodedPages, encode
from aquakv.kernels.encode.operands import EncodeOperands
from aquakv.kernels.from_codec import encode_operands, reconstruct_operands
from aquakv.kernels.reconstruct import reconstruct
from aquakv.models.loading import LoadedModel, load_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SINKS = 4


def keys_and_values(loaded: LoadedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return every layer's bf16 keys before rotary embedding and values, sinks left out."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, layer in enumerate(loaded.model.model.layers):
        for name in ("k_proj", "v_proj"):

            def keep(
                _module: Any, _inputs: Any, output: Tensor, key: tuple[int, str] = (index, name)
            ) -> None:
                found[key] = output[:, SINKS:].flatten(0, 1).bfloat16()

            handles.append(getattr(layer.self_attn, name).register_forward_hook(keep))
    with torch.no_grad():
        loaded.model(tokens)
    for handle in handles:
        handle.remove()
    return [(found[i, "k_proj"], found[i, "v_proj"]) for i in range(len(loaded.model.model.layers))]


class Tally:
    """Counts over layers for one precision."""

    def __init__(self) -> None:
        self.moved, self.codes = torch.zeros(2, 9, dtype=torch.int64)
        self.scales = self.tokens = 0
        self.excess: list[Tensor] = []
        self.decoded: list[Tensor] = []

    def compare(self, ours: EncodedPages, theirs: EncodedPages, operands: EncodeOperands) -> None:
        """Count the differences of one layer's records."""
        for described, own, other in (
            (operands.keys, ours.key_pages, theirs.key_pages),
            (operands.values, ours.value_pages, theirs.value_pages),
        ):
            layout = described.layout
            same = (record_scales(own) == record_scales(other)).flatten()
            pair = [unpack_pages(record_planes(r, layout).contiguous(), layout)[same] for r in (own, other)]
            self.scales += int((~same).sum())
            self.tokens += len(same)
            widths = torch.tensor(layout.widths)
            for width in widths.unique().tolist():
                differ = (pair[0] != pair[1])[:, widths == width]
                self.moved[width] += differ.sum()
                self.codes[width] += differ.numel()

    def row(self, name: str, errors: Tensor) -> dict[str, Any]:
        """Return the result row; errors are those of the codec itself."""
        share = {w: float(self.moved[w] / self.codes[w]) for w in range(1, 9) if self.codes[w]}
        return {
            "contestant": name,
            "codes_moved": float(self.moved.sum() / self.codes.sum()),
            "codes_moved_by_width": share,
            "scales_moved": self.scales / self.tokens,
            "error_ratio": float(torch.stack(self.excess).mean() / errors.mean()),
            "decoded_error_ratio": float(torch.stack(self.decoded).mean() / errors.mean()),
        }


def compare(codec: ModelCodec, tensors: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Encode all layers in all precisions."""
    tallies = {dtype: Tally() for dtype in DTYPES}
    latents: dict[torch.dtype, Tensor | None] = dict.fromkeys(DTYPES)
    history, errors = (), []
    for index, (layer, (keys, values)) in enumerate(zip(codec.layers, tensors, strict=True)):
        following = codec.layers[index + 1] if index + 1 < len(codec.layers) else None
        _, hat = layer.encode(keys, values, history)
        history = layer.extend(history, hat)
        excess = layer.excess(keys, values, hat)
        assert excess is not None
        errors.append(excess)
        common, whole = latents[torch.float32], reconstruct_operands(layer, dtype=torch.float32)
        exact = None
        for dtype, tally in tallies.items():
            operands = encode_operands(layer, following, dtype=dtype)
            got = encode(keys, values, common, operands)
            exact = got if exact is None else exact
            tally.compare(got, exact, operands)
            own = got if dtype == torch.float32 else encode(keys, values, latents[dtype], operands)
            assert own.excess is not None
            tally.excess.append(own.excess)
            seen = reconstruct(own.key_pages, own.value_pages, latents[dtype], whole, centred=True)
            decoded = layer.excess(keys, values, Reconstruction(*seen))
            assert decoded is not None
            tally.decoded.append(decoded)
            latents[dtype] = None if own.next_latents is None else own.next_latents.float()
    return [t.row(str(d).removeprefix("torch."), torch.stack(errors)) for d, t in tallies.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration-samples", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model("demo", "float32", "cpu")
    sources = ["wikitext2:validation"]
    tokens = token_sequences(sources, loaded.tokenizer, options.calibration_samples, 1024, options.data_dir)
    codec = calibrate(loaded.model, tokens, preset("decode"))
    tokens = token_sequences(
        ["wikitext2:test"], loaded.tokenizer, options.samples, 1024 + SINKS, options.data_dir
    )
    rows = compare(codec, keys_and_values(loaded, tokens))
    for row in rows:
        row |= {"data": "wikitext2:test", "tokens": options.samples * 1024}
        print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})
    write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()
