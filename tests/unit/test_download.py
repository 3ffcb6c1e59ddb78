"""Downloads by the real clients of both hubs, from a server on this machine."""

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from hub_server import Hub, running_hub
from safetensors.torch import save

import majicflux.downloads.download as module
from majicflux.downloads import hubs
from majicflux.downloads.catalogue import HUB_NAMES, HUGGINGFACE, MODELSCOPE, KnownFile, Place
from majicflux.downloads.download import PARTIAL_FOLDER, DownloadError, download, require_space
from majicflux.downloads.hubs import WRITTEN_AT_ONCE

CHUNK = 2**14  # the clients write so much at a time, here
CUT = 5 * CHUNK + 100
PATH = "somewhere/inside/small.safetensors"
GENERATOR = torch.Generator().manual_seed(0)
CONTENT = save({"weight": torch.randn(300, 200, generator=GENERATOR)})
SMALL = KnownFile(
    "small.safetensors",
    "vae",
    "Made-up Licence",
    (
        Place(MODELSCOPE, "someone/small", PATH, "master"),
        Place(HUGGINGFACE, "someone/small", PATH, "main"),
    ),
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that both clients take for their hub; they try once and write small pieces."""
    import huggingface_hub.file_download
    import modelscope_hub._download
    import modelscope_hub.config

    constants = huggingface_hub.constants
    with running_hub() as server:
        server.files[f"someone/small/{PATH}"] = CONTENT
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        modelscope_hub.config.set_default_config(None)  # which keeps the endpoint of before
        monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 0)
        monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # read from HF_ENDPOINT at import
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        no_wait = SimpleNamespace(sleep=lambda _: None)
        monkeypatch.setattr(huggingface_hub.file_download, "time", no_wait)
        yield server
    modelscope_hub.config.set_default_config(None)


@pytest.fixture(params=list(HUB_NAMES))
def hub(request: pytest.FixtureRequest) -> str:
    return request.param


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_arrives_whole_in_its_folder(server: Hub, hub: str, tmp_path: Path) -> None:
    path = download(SMALL, hub, tmp_path)
    assert path == tmp_path / "vae" / "small.safetensors"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["vae"], "nothing is left beside it"
    assert files_in(tmp_path) == ["vae/small.safetensors"]


def test_a_download_that_was_cut_goes_on(server: Hub, hub: str, tmp_path: Path) -> None:
    server.cut_at = CUT
    with pytest.raises(DownloadError, match=r"broke off after .* Run the same command again"):
        download(SMALL, hub, tmp_path)
    assert not (tmp_path / "vae" / "small.safetensors").exists()
    server.down = False
    server.gets.clear()
    assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT
    (name, wanted), *more = server.gets
    assert not more
    assert name.endswith(PATH)
    assert CUT - CHUNK <= int(wanted.removeprefix("bytes=").split("-")[0]) <= CUT


def test_an_attempt_that_brought_something_is_followed_by_another(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when ModelScope's client gives up after its hour."""
    import modelscope_hub._download as client

    server.cut_at = CUT

    def stand_up(*_: object) -> None:
        server.down = False
        raise TimeoutError("the hour is over")

    monkeypatch.setattr(client, "_wait_download_retry", stand_up)
    assert download(SMALL, MODELSCOPE, tmp_path).read_bytes() == CONTENT
    assert len(server.gets) == 2
    assert server.gets[1][1] is not None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"sha256": "0" * 64}, "its SHA-256 is another one"),
        ({"size": 7}, "bytes instead of 7"),
        ({"size": None, "least_size": 10**6}, "bytes instead of at least 1,000,000"),
    ],
)
def test_another_file_than_expected_is_removed(
    server: Hub, hub: str, tmp_path: Path, monkeypatch, other: dict, said: str
) -> None:
    monkeypatch.setattr(hubs, "LOOK_SECONDS", 60)  # the whole file comes before it is looked at
    with pytest.raises(DownloadError, match=f"is not the file that was expected: .*{said}"):
        download(replace(SMALL, **other), hub, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]
    assert not files_in(tmp_path)


def test_a_web_page_is_no_model(server: Hub, hub: str, tmp_path: Path) -> None:
    server.files[f"someone/small/{PATH}"] = b"<html>Please log in</html>"
    with pytest.raises(DownloadError, match="is a web page, not the model"):
        download(replace(SMALL, size=None, sha256=None), hub, tmp_path)
    assert not (tmp_path / "vae" / "small.safetensors").exists()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, r"has no somewhere/inside/small.safetensors in someone/small \(404\). Try --from"),
        (401, "Accept its licence"),
        (403, "Accept its licence"),
        (503, "could not be reached .* Check the network"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    server: Hub, hub: str, tmp_path: Path, status: int, said: str
) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=said):
        download(SMALL, hub, tmp_path)
    assert not (tmp_path / "vae" / "small.safetensors").exists()


def test_without_a_connection_the_network_is_named(server: Hub, hub: str, tmp_path: Path) -> None:
    server.down = True
    with pytest.raises(DownloadError, match=r"could not be reached .* Check the network"):
        download(SMALL, hub, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_too_little_space_is_told_before_anything_is_asked(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"are free in .* Free some space"):
        download(SMALL, hub, tmp_path)
    assert not server.gets
    assert not files_in(tmp_path)
    usage.free = len(CONTENT)  # enough for each, not for the two together
    with pytest.raises(DownloadError, match="still to come"):
        require_space([SMALL, replace(SMALL, name="other.safetensors")], hub, tmp_path)
    assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT


def test_what_has_come_already_needs_no_space(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut_at = CUT
    with pytest.raises(DownloadError):
        download(SMALL, hub, tmp_path)
    server.down = False
    usage = SimpleNamespace(free=len(CONTENT) - CUT + CHUNK)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, r"No space is left in .* it goes on"),
        (errno.EROFS, r"cannot be written to. Change its permissions"),
    ],
)
def test_trouble_with_the_disk_is_told(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    import huggingface_hub.file_download

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "made-up")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fail)
    with pytest.raises(DownloadError, match=said):
        download(SMALL, HUGGINGFACE, tmp_path)


def test_modelscope_s_own_hash_is_checked_where_the_catalogue_has_none(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modelscope_hub._download

    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_HASH_RETRY_TIMES", 1)
    server.sha256 = "0" * 64
    with pytest.raises(DownloadError, match="did not arrive as ModelScope published it"):
        download(replace(SMALL, sha256=None), MODELSCOPE, tmp_path)
    assert not files_in(tmp_path)


def test_an_existing_file_is_left_alone(server: Hub, hub: str, tmp_path: Path) -> None:
    path = tmp_path / "vae" / "small.safetensors"
    path.parent.mkdir()
    mine = CONTENT[:-1] + b"x"  # by its size the right one
    path.write_bytes(mine)
    assert download(SMALL, hub, tmp_path) == path
    assert path.read_bytes() == mine
    path.write_bytes(b"half")
    with pytest.raises(DownloadError, match=r"is there already, but .* Move it away"):
        download(SMALL, hub, tmp_path)
    assert path.read_bytes() == b"half"
    assert not server.gets


def test_a_file_that_appears_meanwhile_is_left_alone(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vae" / "small.safetensors"

    def fetch_while_the_user_works(*arguments: object) -> Path:
        path.write_bytes(b"mine")
        return hubs.fetch(*arguments)

    monkeypatch.setattr(module, "fetch", fetch_while_the_user_works)
    with pytest.raises(DownloadError, match="was not replaced"):
        download(SMALL, hub, tmp_path)
    assert path.read_bytes() == b"mine"


def let_go() -> None:
    """Wait for a client that was given up; the program would have ended."""
    for thread in threading.enumerate():
        if thread.name == hubs.THREAD:
            thread.join()


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_an_answer_that_never_ends_is_stopped_where_the_file_must(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """Where only the size of its tensors is known, a header may come on top."""
    monkeypatch.setattr(module, "FORMAT_HEADER_BYTES", 10**6)
    file = replace(SMALL, size=size, least_size=10**5)
    server.endless = True
    with pytest.raises(DownloadError, match=f"more of {PATH} than the {size or 1_100_000:,} bytes"):
        download(file, hub, tmp_path)
    assert not (tmp_path / "vae" / "small.safetensors").exists()
    server.endless = False
    let_go()
    assert download(file, hub, tmp_path).read_bytes() == CONTENT


def test_a_hub_that_is_busy_is_waited_for_and_that_is_said(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.busy = 2
    with caplog.at_level(logging.INFO):
        assert download(SMALL, HUGGINGFACE, tmp_path).read_bytes() == CONTENT
    asked = [r.getMessage() for r in caplog.records if "asks to wait 1 s" in r.getMessage()]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("pause", "said"),
    [("3000", "asks to wait 3000 s"), ("soon", r"no more requests from here for now \(429\)")],
)
def test_a_hub_that_is_busy_for_long_is_not_waited_for(
    server: Hub, tmp_path: Path, pause: str, said: str
) -> None:
    server.busy, server.pause = 1000, pause
    with pytest.raises(DownloadError, match=said):
        download(SMALL, HUGGINGFACE, tmp_path)


def test_a_line_that_always_breaks_gets_there(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After fewer bytes than the client for Hugging Face writes at once by itself."""
    import huggingface_hub.constants
    import modelscope_hub._download

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10 * 2**20)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 1)
    server.cut_each = 2 * WRITTEN_AT_ONCE
    assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT
    starts = [int((wanted or "bytes=0-")[6:].split("-")[0]) for _, wanted in server.gets]
    assert starts == sorted({*starts}), "no byte is asked for twice for long"


def test_a_line_that_hardly_moves_is_given_up_with_what_has_come(
    server: Hub, hub: str, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.cut_at = CUT
    with pytest.raises(DownloadError):
        download(SMALL, hub, tmp_path)
    server.down, server.trickle = False, True
    monkeypatch.setattr(hubs, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(hubs, "TELL_SECONDS", 0.7)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(
            DownloadError, match=r"next to nothing of .* for 2 s. [\d,]+ bytes are there"
        ),
    ):
        download(SMALL, hub, tmp_path)
    assert "waiting for" in caplog.text
    assert hubs.bytes_in(tmp_path) >= CUT - CHUNK
    server.trickle = False
    let_go()
    assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT


def test_what_a_client_does_once_all_has_come_may_take_long(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Putting 24 GB of parts together, on a disk that turns."""
    client = hubs._from_huggingface

    def takes_its_time(*arguments: object) -> Path:
        path = client(*arguments)
        time.sleep(1)
        return path

    monkeypatch.setattr(hubs, "_from_huggingface", takes_its_time)
    monkeypatch.setattr(hubs, "PATIENCE_SECONDS", 0.5)
    assert download(SMALL, HUGGINGFACE, tmp_path).read_bytes() == CONTENT


def test_a_longer_rest_of_another_version_is_begun_anew(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / PARTIAL_FOLDER / HUGGINGFACE / "small.safetensors"
    folder.mkdir(parents=True)
    (folder / "small.safetensors.part").write_bytes(CONTENT + b"more")
    assert download(SMALL, HUGGINGFACE, tmp_path).read_bytes() == CONTENT


def test_nothing_is_written_outside_the_models_folder(
    server: Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODELSCOPE_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    download(SMALL, hub, tmp_path / "models")
    assert files_in(tmp_path) == ["models/vae/small.safetensors"]


def test_two_commands_do_not_write_into_one_file(server: Hub, hub: str, tmp_path: Path) -> None:
    folder = tmp_path / PARTIAL_FOLDER / hub
    folder.mkdir(parents=True)
    with (
        FileLock(folder / "small.safetensors.lock"),
        pytest.raises(DownloadError, match="by another command"),
    ):
        download(SMALL, hub, tmp_path)
    assert not server.gets


@pytest.mark.skipif(sys.platform == "win32", reason="its locks are another kind")
@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_no_obstacle(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As Lustre and NFS are often mounted (huggingface_hub's issue 2399)."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(code, "made-up")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert download(SMALL, HUGGINGFACE, tmp_path).read_bytes() == CONTENT
    assert files_in(tmp_path) == ["vae/small.safetensors"]


def test_a_rest_that_is_whole_is_not_asked_for_again(server: Hub, tmp_path: Path) -> None:
    """As after an end between the last byte and the renaming (huggingface_hub's issue 2197)."""
    folder = tmp_path / PARTIAL_FOLDER / HUGGINGFACE / "small.safetensors"
    folder.mkdir(parents=True)
    (folder / "small.safetensors.part").write_bytes(CONTENT)
    assert download(SMALL, HUGGINGFACE, tmp_path).read_bytes() == CONTENT
    assert not server.gets


def test_a_model_folder_may_be_a_disk_of_its_own(server: Hub, hub: str, tmp_path: Path) -> None:
    other_disk = Path("/dev/shm")
    if not other_disk.is_dir() or other_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    folder = other_disk / f"majicflux-test-{tmp_path.parent.name}-{tmp_path.name}"
    folder.mkdir()
    try:
        (tmp_path / "vae").symlink_to(folder)
        assert download(SMALL, hub, tmp_path).read_bytes() == CONTENT
        assert files_in(folder) == ["small.safetensors"]
    finally:
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_named(server: Hub, hub: str, tmp_path: Path) -> None:
    (tmp_path / "vae").write_bytes(b"")  # a file where the folder should be
    with pytest.raises(DownloadError, match="cannot be written into"):
        download(SMALL, hub, tmp_path)


def test_a_file_that_the_hub_lacks_is_told(tmp_path: Path) -> None:
    file = replace(SMALL, places=SMALL.places[:1])
    with pytest.raises(DownloadError, match=r"Hugging Face does not have small.safetensors"):
        download(file, HUGGINGFACE, tmp_path)


def test_the_command_says_what_it_will_fetch_first(server: Hub, hub: str, tmp_path: Path) -> None:
    """In a process of its own, with nothing but the clients' own environment variables."""
    code = f"""
import sys
from majicflux import cli
from majicflux.commands import download
from majicflux.downloads.catalogue import KnownFile, Place
download.files_of = lambda group, hub: [{SMALL!r}]
sys.exit(cli.main(sys.argv[1:]))
"""
    arguments = ["download", "flux-dev-parts", "--from", hub, "--models", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**clean_environment(), "HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url},
    )
    assert done.returncode == 0, done.stderr
    target = tmp_path / "vae" / "small.safetensors"
    assert target.read_bytes() == CONTENT
    assert done.stdout.splitlines() == [
        f"From {HUB_NAMES[hub]}:",
        f"  {target} (0.0 GB, Made-up Licence)",
        str(target),
    ]
    assert "HTTP Request" not in done.stderr


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
