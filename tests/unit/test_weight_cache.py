"""Prepared weights: kept once, mapped from then on, never half, never wrong."""

import errno
import itertools
import logging
import mmap
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from file_layouts import sparse_file
from lora_dialects import PROJ, QKV, random_factors, written
from majicflux import cli
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.quant.formats import PRECISIONS, Precision
from majicflux.loaders import demo_models, weight_cache
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.layouts import flux_dit_layout
from majicflux.loaders.read_ahead import Reader
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.text_encoders import load_text_encoders
from majicflux.loaders.weight_cache import (
    OURS,
    cached_files,
    clear_cache,
    convert_into_cache,
    map_cached,
)

FLOAT8 = PRECISIONS["float8_e4m3fn"]


@pytest.fixture
def source(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(models / demo_models.DIT_FILE, tmp_path / "majicflus_v134.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


def load(source: Path, folder: Path | None, precision: Precision = FLOAT8):
    return load_flux_dit(source, precision, cache_folder=folder)[0]


def bits(weights) -> dict[str, bytes]:
    return {
        name: p.detach().view(torch.uint8).numpy().tobytes()
        for name, p in weights.module.named_parameters()
    }


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the source is read and converted."""
    counted: list[int] = []
    convert = sys.modules[load_flux_dit.__module__].convert_into
    monkeypatch.setattr(
        f"{load_flux_dit.__module__}.convert_into", lambda *a: (counted.append(1), convert(*a))
    )
    return counted


def test_the_second_load_maps_what_the_first_kept(source, folder, monkeypatch) -> None:
    counted = reads(monkeypatch)
    first = load(source, folder)
    second = load(source, folder)
    assert len(counted) == 1
    assert "mapped from prepared weights" in first.report
    assert bits(first) == bits(second) == bits(load(source, None))


def test_mapped_weights_are_the_files_pages(source: Path, folder: Path) -> None:
    if not Path("/proc/self/maps").is_file():
        pytest.skip("only Linux tells which memory is a file's")
    weights = load(source, folder)
    (kept,) = cached_files(folder)
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(kept))
    ]
    for parameter in weights.module.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped)


def test_without_the_option_nothing_is_written(source: Path, folder: Path) -> None:
    load(source, None)
    assert not folder.exists()
    load(source, folder, PRECISIONS["bfloat16"])  # would only repeat the source
    assert cached_files(folder) == []


def test_a_changed_source_is_prepared_anew(source, folder, monkeypatch) -> None:
    counted = reads(monkeypatch)
    load(source, folder)
    os.utime(source, ns=(1, 1))
    load(source, folder)
    assert len(counted) == 2
    assert len(cached_files(folder)) == 2


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_in_a_block(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-weight_cache.PAGE * 2, os.SEEK_END)
        file.write(bytes(weight_cache.PAGE * 2))


def another_file(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def deep_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"[" * (weight_cache.HEADER_BYTES - 1) + b"\n")


def another_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b'{"majicflux": 0}\n')


def a_scale_that_is_none(path: Path) -> None:
    """As a program might have kept it that did not look: everything else is in order."""
    weights = load_flux_dit(path.parent.parent / "majicflus_v134.safetensors", FLOAT8)[0]
    sizes = [block.nbytes for block in weights.all_blocks]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        buffers = weight_cache._buffers(mapped, sizes)
        weights.live_in(buffers)
        weights.module.blocks[1].ff_a[0].scale[7] = float("nan")
        header = weight_cache._header(buffers)
        weights.forget()
        del buffers
        mapped[: len(header)] = header


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_in_a_block, another_file, deep_header, another_header, a_scale_that_is_none],
)
def test_a_damaged_file_is_removed_and_made_again(
    source, folder, monkeypatch, caplog, damage
) -> None:
    expected = bits(load(source, folder))
    (kept,) = cached_files(folder)
    damage(kept)
    counted = reads(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert bits(load(source, folder)) == expected
    assert "is damaged" in caplog.text
    assert len(counted) == 1
    load(source, folder)
    assert len(counted) == 1


def warned_once(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    return record.getMessage()


def test_a_full_disk_falls_back_to_memory(source, folder, monkeypatch, caplog) -> None:
    usage = shutil.disk_usage(source.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    weights = load(source, folder)
    assert "the disk is too full" in warned_once(caplog)
    assert "in memory" in weights.report
    assert cached_files(folder) == []
    assert bits(weights) == bits(load(source, None))


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    source, folder, monkeypatch, caplog
) -> None:
    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    weights = load(source, folder)
    assert "No space left on device" in warned_once(caplog)
    assert cached_files(folder) == []
    assert "in memory" in weights.report


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the file's length is its room")
def test_a_disk_that_fills_up_while_converting_leaves_nothing(
    source, folder, monkeypatch, caplog
) -> None:
    """As a disk in memory does, which has set nothing aside for the whole file."""
    left = [30]
    allocate = os.posix_fallocate

    def allocates(*arguments: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", allocates)
    weights = load(source, folder)
    assert "No space left on device" in warned_once(caplog)
    assert cached_files(folder) == []
    assert bits(weights) == bits(load(source, None))


def test_all_weights_have_their_room_before_they_are_written(source, folder, monkeypatch) -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("the file's length is its room")
    rooms: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _, start, size: rooms.append((start, size)))
    weights = load(source, folder)
    assert sum(size for start, size in rooms if start) == sum(
        p.nbytes for p in weights.module.parameters()
    )
    assert rooms[0] == (0, weight_cache.HEADER_BYTES)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(sorted(rooms)))


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="Linux only")
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_converted_is_written_out_meanwhile(
    source, folder, monkeypatch, caplog, fails: bool
) -> None:
    """An error of the disk is told once, so that the last sync does not know of it."""
    written: list[int] = []

    def write_out(_: int) -> None:
        written.append(1)
        if fails:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", write_out)
    monkeypatch.setattr(weight_cache, "WRITE_OUT_SECONDS", 0.001)
    weights = load_flux_dit(source, FLOAT8, lambda *_: time.sleep(0.001), folder)[0]
    assert written
    assert ("Input/output error" in caplog.text) == fails == weights.anonymous
    assert cached_files(folder) == [] if fails else cached_files(folder)


def test_it_is_told_that_weights_are_being_kept(source, folder, monkeypatch) -> None:
    told: list[tuple[int, int, str]] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (told.append((0, 0, "sync")), sync(file)))
    load_flux_dit(source, FLOAT8, lambda *t: told.append(t), folder)
    (kept,) = cached_files(folder)
    size = kept.stat().st_size
    assert told[-2:] == [(size, size, weight_cache.KEEPING), (0, 0, "sync")]

    def cancel(done: int, total: int, doing: str) -> None:
        if doing == weight_cache.KEEPING:
            raise KeyboardInterrupt

    kept.unlink()
    with pytest.raises(KeyboardInterrupt):
        load_flux_dit(source, FLOAT8, cancel, folder)
    assert cached_files(folder) == []


def test_a_folder_that_cannot_be_made_is_no_obstacle(source, folder, caplog) -> None:
    folder.write_text("a file where the folder should be")
    assert "in memory" in load(source, folder).report
    assert warned_once(caplog)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_killed_while_preparing_leaves_no_half_file(source: Path, folder: Path) -> None:
    finished = load(source, None)
    expected = bits(finished)
    other = load(source, None)

    def convert(
        _: object,
    ) -> None:  # with nothing in it that starts threads, which do not survive a fork
        for to, block in zip(other.all_blocks, finished.all_blocks, strict=True):
            to.host_buffer.numpy()[:] = block.host_buffer.numpy()

    target = folder / "weights.majicflux"
    chance = random.Random(0)
    unfinished = 0
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:  # until it is killed
                convert_into_cache(other, target, convert)
                target.unlink(missing_ok=True)
        time.sleep(chance.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(p.suffix == ".part" for p in cached_files(folder))
        if target.is_file():  # under its name a file is whole
            assert map_cached(fresh := load(source, None), target)
            assert bits(fresh) == expected
    assert unfinished > 10, "the kills came at the wrong moments"


@pytest.mark.parametrize("name", ["麦" * 80, "é" * 115, "a" * 240, "m. " * 60])
def test_a_long_name_is_kept_under_its_beginning(source: Path, folder: Path, name: str) -> None:
    """In bytes: 85 Chinese characters are as long as a name can be."""
    named = source.with_name(f"{name}.safetensors")
    source.rename(named)
    expected = bits(load(named, folder))
    (kept,) = cached_files(folder)
    assert name.startswith(kept.name[:10])
    assert len(os.fsencode(kept.name)) < 143  # what an encrypted home folder allows
    assert bits(load(named, folder)) == expected
    assert "mapped" in load(named, folder).report


def test_a_damaged_source_or_a_cancelled_load_leaves_nothing(source: Path, folder: Path) -> None:
    def cancel(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_flux_dit(source, FLOAT8, cancel, folder)
    assert cached_files(folder) == []
    tensors = load_file(source)
    tensors["model.diffusion_model.single_blocks.3.linear2.weight"][0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(ModelFileError, match="a NaN"):
        load(source, folder)
    assert cached_files(folder) == []


def test_preparing_never_holds_the_weights_in_anonymous_memory(
    tmp_path: Path, folder: Path
) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    layout = flux_dit_layout(FluxGeometry(double_blocks=1, single_blocks=2))
    path = sparse_file(tmp_path / "wide.safetensors", layout)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(dict(x.split(":", 1) for x in lines)["RssAnon"].split()[0])

    load(path, None)  # what is imported and allocated once
    before, most = anonymous(), 0

    def watch(*_: int) -> None:
        nonlocal most
        most = max(most, anonymous() - before)

    weights, _ = load_flux_dit(path, FLOAT8, watch, folder)
    assert most < 0.2 * weights.total_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not remove what is open")
@pytest.mark.parametrize("locks", [True, False])
def test_what_is_left_of_a_process_goes_once_that_process_is_gone(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    import fcntl

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "as some disks of other machines")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuses)
    folder.mkdir()
    left = folder / "a.majicflux.1.part"
    left.touch()
    os.utime(left, (1, 1))
    being_made = weight_cache._new_partial(folder / "b.majicflux")
    load(source, folder)
    assert not left.exists()
    assert Path(being_made.name).exists(), "its maker lives"
    assert clear_cache(folder) > 0
    assert cached_files(folder) == [Path(being_made.name)]
    being_made.close()
    if locks:
        clear_cache(folder)
        assert cached_files(folder) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_of_one_number_do_not_write_into_one_file(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers that share a models folder: a file that is mapped must not shrink."""
    finished, other = load(source, None), load(source, None)
    monkeypatch.setattr(os, "getpid", lambda: 42)

    def convert(_: object) -> None:  # see above
        for to, block in zip(other.all_blocks, finished.all_blocks, strict=True):
            to.host_buffer.numpy()[:] = block.host_buffer.numpy()
            time.sleep(0.0005)

    for delay in (0.0, 0.002, 0.005, 0.01):
        children = []
        for wait in (0.0, delay):
            child = os.fork()
            if child == 0:
                time.sleep(wait)
                kept = convert_into_cache(other, folder / "weights.majicflux", convert)
                os._exit(0 if kept and bits(other) == bits(finished) else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert len(cached_files(folder)) == 1
        shutil.rmtree(folder)


def test_a_planted_link_is_not_followed(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    names = iter(["aa", "bb"])
    monkeypatch.setattr(weight_cache.secrets, "token_hex", lambda _: next(names))
    load(source, folder)
    (kept,) = cached_files(folder)
    kept.unlink()
    kept.with_name(f"{kept.name}.bb.part").symlink_to(precious)
    weights = load(source, folder)
    assert precious.read_text() == "mine"
    assert weights.anonymous or cached_files(folder) == [kept]


def replaced(path: Path) -> None:
    """By another model of the same length and time."""
    state, tensors = path.stat(), load_file(path)
    other = path.with_name("other")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other, {"made": "2"})
    assert other.stat().st_size == state.st_size
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(path)


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("change", "moment"),
    [(replaced, "__enter__"), (written_over, "__enter__"), (written_over, "read")],
)
def test_a_model_that_changes_while_it_is_read_is_not_kept(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, change, moment: str, keeps: bool
) -> None:
    save_file(load_file(source), source, {"made": "1"})
    original = getattr(Reader, moment)
    changes = iter([change])

    def changed(*arguments):
        result = original(*arguments)
        for change in changes:  # once
            change(source)
        return result

    monkeypatch.setattr(Reader, moment, changed)
    with pytest.raises(ModelFileError, match=r"majicflus_v134\.safetensors was changed while"):
        load(source, folder if keeps else None)
    assert cached_files(folder) == []
    assert bits(load(source, folder)) == bits(load(source, None))


def test_a_long_name_is_cut(source: Path, folder: Path) -> None:
    """Together with what is added to it, it would be longer than file systems take."""
    source = source.rename(source.with_name("麦" * 80 + ".safetensors"))
    assert "mapped from prepared weights" in load(source, folder).report
    (kept,) = cached_files(folder)
    assert kept.name.startswith("麦" * 21 + "-")


def test_clearing_leaves_what_is_not_ours(source: Path, folder: Path, tmp_path: Path) -> None:
    """The folder may be a link to one that holds other things."""
    load(source, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    others = [folder / "film.mkv.part", folder / "notes.part", folder / ".majicflux"]
    for path in others:
        path.touch()
    directory = folder / "a.majicflux.1.part"
    directory.mkdir()
    (folder / "dangling.majicflux").symlink_to(tmp_path / "nowhere")
    assert len(cached_files(folder)) == 1
    assert clear_cache(folder) > 0
    assert all(path.exists() for path in [*others, directory])
    assert cached_files(folder) == []


def test_one_that_cannot_be_removed_does_not_keep_the_others(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source, folder)
    (folder / "a.majicflux").touch()
    unlink = Path.unlink

    def refuses(path: Path, *arguments: object) -> None:
        if path.name == "a.majicflux":
            raise PermissionError(13, "it is mapped")
        unlink(path, *arguments)

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(ModelFileError, match=r"a\.majicflux cannot be removed: it is mapped"):
        clear_cache(folder)
    assert [path.name for path in cached_files(folder)] == ["a.majicflux"]


def test_text_encoders_are_mapped_too(models: Path, tmp_path: Path) -> None:
    """They are ten gigabytes, which a small machine does not have."""
    clip, t5 = models / demo_models.CLIP_FILE, models / demo_models.T5_FILE
    plain = load_text_encoders(clip, t5, torch.bfloat16)
    assert "in memory" in plain.report
    times = set()
    for _ in range(2):
        mapped = load_text_encoders(clip, t5, torch.bfloat16, cache_folder=tmp_path)
        assert "mapped from prepared weights" in mapped.report
        assert not mapped.anonymous
        (kept,) = cached_files(tmp_path)
        times.add(kept.stat().st_mtime_ns)
        theirs = mapped.module.state_dict()
        for name, tensor in plain.module.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    assert len(times) == 1, "kept once"
    assert load_text_encoders(clip, t5, torch.float32, cache_folder=tmp_path).module
    assert len(cached_files(tmp_path)) == 2


def baked_name(loras: list[tuple[Path, float]], source: Path, folder: Path) -> str:
    """Of the one file that is new once these were baked."""
    before = {*cached_files(folder)}
    weights, _ = load_flux_dit(source, FLOAT8, cache_folder=folder, baked=loras)
    assert "mapped from prepared weights" in weights.report
    (new,) = {*cached_files(folder)} - before
    return new.name


def test_what_is_baked_is_kept_by_its_file_and_strength(source, folder, saved, monkeypatch) -> None:
    style = saved(written(random_factors([PROJ])), "loras/style.safetensors")
    other = saved(written(random_factors([QKV])), "loras/other.safetensors")
    counted = reads(monkeypatch)
    load(source, folder)
    both = [(style, 0.8), (other, 1.0)]
    assert baked_name(both[:1], source, folder).startswith("majicflus_v134+style@0.8-")
    assert baked_name([(style, -0.25)], source, folder).startswith("majicflus_v134+style@-0.25-")
    assert baked_name(both, source, folder).startswith("majicflus_v134+style@0.8+other@1-")
    baked_name(both[::-1], source, folder)
    made = len(counted)
    bits_of = [
        bits(load_flux_dit(source, FLOAT8, cache_folder=folder, baked=loras)[0])
        for loras in ([], both[:1], both, [(style, -0.25)])
    ]
    assert len(counted) == made
    assert all(one != other for one, other in itertools.combinations(bits_of, 2))
    assert bits_of[1] == bits(load_flux_dit(source, FLOAT8, baked=both[:1])[0])
    saved(written(random_factors([PROJ], alpha=4.0)), "loras/style.safetensors")
    baked_name(both[:1], source, folder)  # the file is another one


def test_many_long_names_of_what_is_baked(source, folder, saved) -> None:
    loras = [
        (saved(written(random_factors([PROJ])), f"{'长' * 60}{i}.safetensors"), 0.125 * i)
        for i in range(12)
    ]
    name = baked_name(loras, source, folder)
    assert len(os.fsencode(name)) <= 64 + len(f"-{'0' * 24}.majicflux")
    assert OURS.fullmatch(name)


def test_the_list_tells_what_was_baked(source, saved, capsys) -> None:
    folder = source.parent / "majicflux_prepared"
    style = saved(written(random_factors([PROJ])), "loras/style.safetensors")
    load_flux_dit(source, FLOAT8, cache_folder=folder, baked=[(style, 0.8)])
    assert cli.main(["cache", "list", "--models", str(source.parent)]) == 0
    assert "majicflus_v134+style@0.8-" in capsys.readouterr().out
