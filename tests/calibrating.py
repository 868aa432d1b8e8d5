"""Small calibrations that several test modules share."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from aquakv import calibrate, preset
from aquakv.codec import ModelCodec
from aquakv.models.streaming import stream_directory
from tiny_models import WINDOW, build, random_tokens, same_bits

CPU = torch.device("cpu")
TOKENS = random_tokens(12, 48, seed=1)


def config(name):
    return dataclasses.replace(preset(name), window=WINDOW)


@functools.cache
def saved(kind, root):
    """Write a tiny model as a checkpoint of many small files."""
    directory = root / kind
    build(kind).save_pretrained(directory, max_shard_size="20KB")
    return directory


def streamed(directory, device=CPU):
    return stream_directory(directory, AutoConfig.from_pretrained(directory), "auto", device)


def same_codec(a, b):
    mine, theirs = a.content()[1], b.content()[1]
    return mine.keys() == theirs.keys() and same_bits(
        [mine[name] for name in sorted(mine)], [theirs[name] for name in sorted(theirs)]
    )


class Killed(BaseException):
    pass


def killer(when):
    """Return what interrupts a calibration after so many batches."""

    def report(state):
        if state.done == when:
            raise Killed

    return report


_WORKER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
import calibrating
from aquakv import calibrate
from aquakv.calibration.group import Group, join, leave
place = join(torch.device({device!r}))
{first}
for name in {names!r}:
    for overlap in {overlaps!r}:
        adapter, config = calibrating.streamed(Path({model!r}), place), calibrating.config(name)
        codec = calibrate(adapter, calibrating.TOKENS, config, batch_size=2, overlap=overlap)
        codec.save(Path({out!r}) / f"{{name}}-{{overlap}}-{{Group.current(place).rank}}")
leave()
"""


def together(model, out, names, device="cpu", overlaps=(None,), first=""):
    """Calibrate in two processes, as torchrun starts them; return the codecs of each, by name and overlap."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"tests": os.path.dirname(__file__), "model": str(model), "out": str(out), "names": names}
    script = _WORKER.format(**settings, device=device, overlaps=overlaps, first=first)
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return {
        (name, overlap): [ModelCodec.load(out / f"{name}-{overlap}-{rank}") for rank in range(2)]
        for name in names
        for overlap in overlaps
    }


def assert_codec_of_one_process(codecs, name, model, device=CPU):
    """Compare what two processes have made with each other, and with what one makes."""
    first, second = codecs
    assert same_codec(first, second)
    one = calibrate(streamed(model, device), TOKENS, config(name), batch_size=2)
    mine, theirs = one.content()[1], first.content()[1]
    assert mine.keys() == theirs.keys()
    # Sums of float64 in another order; what follows is rounded to float32 and bfloat16.
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key].double(), tensor.double(), rtol=2**-8, atol=1e-4)
    for a, b in zip(one.calibration["layers"], first.calibration["layers"], strict=True):
        assert a["keys"] == pytest.approx(b["keys"], rel=1e-3, abs=1e-6)
