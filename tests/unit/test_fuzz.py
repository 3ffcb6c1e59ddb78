"""Broken headers of every kind end in our own error, never in a crash, a hang or much memory.

MAJICFLUX_FUZZ_CASES sets how many cases are tried (20,000 in the long run).
"""

import math
import os
import random
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from broken_headers import header_bytes, mutated
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.layouts import flux_dit_layout
from majicflux.loaders.safetensors_file import MAX_TENSORS, ModelFileError, SafetensorsFile
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.vae import inspect_vae

CASES = int(os.environ.get("MAJICFLUX_FUZZ_CASES", "1500"))


def test_every_broken_file_is_refused_in_our_own_words(models: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    inspectors = {
        demo_models.DIT_FILE: inspect_flux_dit,
        demo_models.CLIP_FILE: inspect_clip,
        demo_models.T5_FILE: inspect_t5,
    }
    contents = {name: (models / name).read_bytes() for name in inspectors}
    path = tmp_path / "model.safetensors"
    refused = 0
    for case in range(CASES):
        # The transformer is the largest by far, so it is tried less often.
        name = chance.choices(list(inspectors), weights=[1, 20, 20])[0]
        path.write_bytes(mutated(chance, contents[name]))
        try:
            inspectors[name](path)
        except ModelFileError:
            refused += 1
        except Exception as error:
            pytest.fail(f"case {case}: {error!r} is not our own error")
    assert refused > CASES * 0.7, "most of these files are broken"


def test_a_header_cannot_ask_for_more_memory_than_the_file_is_long(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    huge = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for content in (
        header_bytes({"a": huge}),
        (99 * 2**20).to_bytes(8, "little") + b'{"a":' + bytes(1000),
        header_bytes({"a": {**huge, "shape": [2**20] * 60}}),
    ):
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ModelFileError):
            SafetensorsFile(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


BIG = "9" * 4301
MARKER = "double_blocks.0.img_attn.qkv.weight"


def entries(*shapes: str, name: str = "a{}", dtype: str = "F32") -> str:
    """The text of a header with tensors of these shapes, all empty."""
    found = [
        f'"{name.format(index)}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,0]}}'
        for index, shape in enumerate(shapes)
    ]
    return "{" + ",".join(found) + "}"


def blocks(*names: str) -> str:
    """A header with as many tensors as are read, of the kind that the first name shows."""
    first = entries("[0]", name=names[0])
    rest = entries(*["[0]"] * (MAX_TENSORS - len(names)), name=names[1])
    return first[:-1] + "," + rest[1:]


HOSTILE = {
    "numbers": entries("[" + ",".join(["9" * 18] * 100_000) + "]"),
    "digits": entries("[" + BIG + "]"),
    "powers": entries("[" + "9" * 400 + "]"),
    "axes": entries("[" + ",".join("1" * 100) + "]"),
    "keys": entries(*["[0]"] * 100_000),
    "brackets": '{"a":[' + "[]," * 3_000_000 + "[]]}",
    "braces": '{"a":{"shape":' + "{}," * 3_000_000,
    "open": "{" + '"a":' + "[" * 9_000_000,
    "nested": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested entry": entries("[" * 100_000 + "]" * 100_000),
    "nested metadata": '{"__metadata__":{"a":' + "[" * 100_000 + "}}",
    "metadata": '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(500_000)) + "}}",
    "long name": entries("[1]", name="n" * 9_000_000),
    "long dtype": entries("[0]", dtype="F" * 9_000_000),
    "odd dtype": entries("[0]", dtype="\\u001b[2J"),
    "odd name": entries("[0]", name="\\ud800"),
    "line in a name": entries("[1]", name="a\\nb"),
    "wide letters": '{"__metadata__":{"a":"\U0001f600' + "x" * 9_000_000 + '"}}',
    "escapes": '{"__metadata__":{"a":"' + '\\"' * 4_500_000 + '"}}',
    "spaces": "{" + " " * 9_000_000 + entries("[1]")[1:],
    "end": entries("[0]") + "x",
    "double blocks": blocks(MARKER, "double_blocks.{}.x"),
    "Diffusers": blocks("transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.{}.x"),
    "layers": blocks("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.{}.x"),
    "VAE": blocks(
        "decoder.mid_block.resnets.0.conv1.weight", "x" * 200 + ".up_blocks.1.resnets.{}"
    ),
    "100 MB": entries("[0]") + " " * (99 * 2**20),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_header_takes_long_or_much_memory_or_fills_the_screen(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = HOSTILE[kind].encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    for inspect in (inspect_flux_dit, inspect_clip, inspect_t5, inspect_vae):
        start = time.process_time()
        with pytest.raises(ModelFileError) as caught:
            inspect(path)
        assert time.process_time() - start < 1
        assert len(str(caught.value)) < 1000
        assert str(caught.value).replace("\n", "").isprintable()
    tracemalloc.start()
    with suppress(ModelFileError):
        SafetensorsFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("width", [1, 5000])
def test_as_many_blocks_as_can_be_named_are_refused(tmp_path: Path, width: int) -> None:
    """Whole otherwise, so that the layout of all of them would be demanded."""
    layout = flux_dit_layout(FluxGeometry(double_blocks=1, single_blocks=1))
    header = {
        name: {"dtype": "U8", "shape": [0, *shape[1:]], "data_offsets": [0, 0]}
        for name, shape in layout.items()
    }
    for name in ("img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"):
        size = math.prod(layout[name])
        end = max(entry["data_offsets"][1] for entry in header.values())
        header[name] = {"dtype": "U8", "shape": layout[name], "data_offsets": [end, end + size]}
    for index in range(width):
        header[f"single_blocks.{index + 300}.linear1.bias"] = header["txt_in.weight"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_bytes(header, bytes(10**6)))
    with pytest.raises(ModelFileError, match="has 5,001 blocks" if width > 256 else "incomplete"):
        inspect_flux_dit(path)


@pytest.mark.parametrize(
    "marker",
    [
        b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":' + BIG.encode() + b"}",
        b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":1e400}',
        b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":NaN}',
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b"[" * 1020,
        b"[" + b"[]," * 10**6 + b"[]]",
        b"\xff",
    ],
)
def test_no_marker_of_a_format_takes_long_or_ends_in_another_error(
    tmp_path: Path, marker: bytes
) -> None:
    header = {
        MARKER: {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        MARKER.removesuffix("weight") + "comfy_quant": {
            "dtype": "U8",
            "shape": [len(marker)],
            "data_offsets": [1, 1 + len(marker)],
        },
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_bytes(header, b"\0" + marker))
    start = time.process_time()
    with pytest.raises(ModelFileError):
        inspect_flux_dit(path)
    assert time.process_time() - start < 1


def test_what_other_programs_write_into_a_header_is_read(tmp_path: Path) -> None:
    """Long metadata as of trainers, spaces, another order, a field that nobody knows."""
    path = tmp_path / "model.safetensors"
    text = """ { "__metadata__" : {"tags": "%s", "number": 5} ,
    "a b" : { "shape" : [ 1, 2 ] , "more": null, "data_offsets" : [0, 8], "dtype":"F32" } }   """
    whole = (text[1:] % ("x" * 2_000_000)).encode()
    path.write_bytes(len(whole).to_bytes(8, "little") + whole + bytes(8))
    file = SafetensorsFile(path)
    assert file.tensors["a b"].shape == (1, 2)
    assert file.metadata["tags"] == "x" * 2_000_000
    path.write_bytes(
        header_bytes(
            {"__metadata__": None, "a b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
        )
    )
    assert SafetensorsFile(path).metadata == {}
    save_file({"a": torch.zeros(3)}, path, {"kept": "as it is"})
    assert SafetensorsFile(path).metadata == {"kept": "as it is"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelFileError, match="is not a file"):
        inspect_vae(tmp_path / "pipe.safetensors")
