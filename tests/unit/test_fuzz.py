"""Broken headers of every kind end in our own error, never in a crash, a hang or much memory.

MAJICFLUX_FUZZ_CASES sets how many cases are tried (20,000 in the long run).
"""

import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError, SafetensorsFile
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.vae import inspect_vae

CASES = int(os.environ.get("MAJICFLUX_FUZZ_CASES", "1500"))
ODD = [
    -1, 0, 1, 2**31, 2**63, 2**64, 1e300, 0.5, float("nan"), True, None, "", "F32", "\ud800",
    [], {}, [0], [0, 0], [[0, 0], [0, 0]], [-1, 5], [2**62, 2**63], {"a": {}},
]  # fmt: skip


def header_bytes(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def small_header(whole: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def mutated(chance: random.Random, whole: bytes) -> bytes:
    header, body = small_header(whole)
    name = chance.choice([n for n in header if n != "__metadata__"])
    kind = chance.randrange(9)
    if kind == 0:  # bytes of the beginning
        changed = bytearray(whole[:20_000])
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed) + whole[20_000:]
    if kind == 1:
        return whole[: chance.randrange(len(whole))]
    if kind == 2:
        return chance.randbytes(chance.randrange(2000))
    if kind == 3:
        return chance.choice([2**63, 2**64 - 1, 100 * 2**20, len(whole), 0, 1]).to_bytes(
            8, "little"
        ) + (whole[8:] if chance.random() < 0.5 else b"{" * chance.randrange(50_000))
    if kind == 4:
        header[name][chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(ODD)
    elif kind == 5:
        header[name] = chance.choice(ODD)
    elif kind == 6:
        field = header[name][chance.choice(["shape", "data_offsets"])]
        if field:
            field[chance.randrange(len(field))] = chance.choice(ODD)
    elif kind == 7:
        del header[name]
    else:
        other = chance.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    return header_bytes(header, body)


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


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelFileError, match="damaged header"):
        inspect_vae(path)
