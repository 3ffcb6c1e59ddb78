"""Files whose headers are broken in every way."""

import json
import random

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
