"""``aquakv inspect``: what a codec is, per layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aquakv.codec import ModelCodec
from aquakv.config import to_dict


def inspect(
    codec: Annotated[Path, typer.Argument(metavar="CODEC", help="Codec file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print what a codec file holds."""
    loaded = ModelCodec.load(codec)
    record = {k: v for k, v in loaded.calibration.items() if k != "layers"}
    if as_json:
        content = {
            "config": to_dict(loaded.config),
            "fingerprint": to_dict(loaded.fingerprint),
            "bits_per_value": loaded.bits_per_value,
            "calibration": to_dict(dict(loaded.calibration)),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    fingerprint, print_ = loaded.fingerprint, Console().print
    bits = f"{loaded.bits_per_value:.3f} bits per value"
    print_(f"[bold]{escape(str(codec))}[/bold]: preset {loaded.config.preset}, {bits}")
    layers = f"{len(fingerprint.compressed_layers)} of {fingerprint.num_layers} layers compressed"
    heads = f"{fingerprint.num_kv_heads} KV heads of {fingerprint.head_dim}"
    print_(f"model: {fingerprint.architecture}, {layers}, {heads}")
    for name, value in to_dict(loaded.config).items():
        if isinstance(value, dict):
            print_(f"{name}: " + ", ".join(f"{k} {v}" for k, v in value.items()), highlight=False)
    names = [source["name"] if isinstance(source, dict) else source for source in record.get("data", [])]
    data = escape(", ".join(map(str, names)) or "unnamed data")
    print_(
        f"calibrated on {record.get('tokens')} tokens ({data}) in {record.get('seconds')} s, "
        f"{record.get('held_out_sequences')} of {record.get('sequences')} sequences held out",
        highlight=False,
    )
    print_(_table(loaded.calibration.get("layers", [])))


def _table(layers: list[dict[str, Any]]) -> Table:
    table = Table(
        "layer", "key bits", "predicted", "error", "weight", "value bits", "predicted", "error", "weight"
    )
    for column in table.columns:
        column.justify = "right"
    for layer in layers:
        figures = []
        for kind, bits in (("keys", "key_bits"), ("values", "value_bits")):
            figures.append(f"{layer[bits]:.2f}")
            figures.append(f"{100 * layer[kind]['explained_variance']:.1f} %")
            figures.append(f"{100 * layer[kind]['reconstruction_error']:.3f} %")
            figures.append(f"{layer['importance'][kind]:.2f}")
        table.add_row(str(layer["layer"]), *figures)
    return table
