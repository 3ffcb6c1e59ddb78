"""The autoencoder in bands of rows, against DiffSynth's own forward and against its plan."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from majicflux.engine.flux import vae_bands
from majicflux.engine.flux.vae_band_plan import BandPlan, plan_decode, plan_encode
from majicflux.engine.flux.vae_bands import decode, encode

ROOMY = float("inf")
META = torch.device("meta")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
PLANS = {"decode": plan_decode, "encode": plan_encode}
SIZES = {  # height and width as the plan takes them
    "decode": [(64, 64), (128, 128), (256, 256), (192, 80), (80, 192)],
    "encode": [(512, 512), (1024, 1024), (2048, 2048), (1536, 640), (640, 1536)],
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come up while it is entered and are still alive."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.counting = True
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        nbytes = storage.nbytes() if self.counting else 0
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counting = False
        yield
        self.counting = True


@cache
def model_on_meta(kind: str, dtype: torch.dtype) -> nn.Module:
    with META:
        return (FluxVAEDecoder if kind == "decode" else FluxVAEEncoder)().to(dtype)


def on_meta(kind: str, dtype: torch.dtype, height: int, width: int) -> tuple[nn.Module, Tensor]:
    shape = 1, 16 if kind == "decode" else 3, height, width
    return model_on_meta(kind, dtype), torch.empty(shape, dtype=dtype, device=META)


@pytest.fixture
def host_maps(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """What `host_map` has given since."""
    given: list[weakref.ref] = []
    allocate = vae_bands.host_map

    def host_map(*args) -> Tensor:
        given.append(weakref.ref(tensor := allocate(*args)))
        return tensor

    monkeypatch.setattr(vae_bands, "host_map", host_map)
    return given


def random_model(model_class: type[nn.Module]) -> nn.Module:
    with META:
        model = model_class()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(mean, size, generator=generator)
    return model


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return random_model(FluxVAEDecoder)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return random_model(FluxVAEEncoder)


def noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))


def narrow(plan: Callable[[float], BandPlan]) -> Iterator[BandPlan]:
    """Bands of several sizes, with maps in either memory; small pictures get none by themselves."""
    yield replace(plan(0), passes=tuple((5, *rest) for _, *rest in plan(0).passes))
    some = plan(0.4 * plan(ROOMY).peak_bytes)
    assert len({resident for _, resident, _ in some.passes[:-1]}) == 2
    yield replace(some, passes=tuple((7, *rest) for _, *rest in some.passes))
    yield replace(some, passes=tuple((11, *rest) for _, *rest in plan(ROOMY).passes))
    yield plan(ROOMY)


def assert_same(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    assert found.dtype == exact.dtype
    assert not found.requires_grad
    assert (found - exact).abs().max() <= 1e-5 * (exact.max() - exact.min())


@pytest.mark.parametrize(("height", "width"), [(5, 6), (2, 11), (9, 2)])
def test_bands_decode_what_the_decoder_does(decoder: nn.Module, height: int, width: int) -> None:
    latent = noise(16, height, width)
    with torch.no_grad():
        exact = decoder(latent)
    for bands in narrow(partial(plan_decode, height, width, 4)):
        assert_same(decode(decoder, latent, bands), exact)


@pytest.mark.parametrize(("height", "width"), [(40, 48), (25, 70), (72, 16)])
def test_bands_encode_what_the_encoder_does(encoder: nn.Module, height: int, width: int) -> None:
    picture = noise(3, height, width).clamp(-1, 1)
    with torch.no_grad():
        exact = encoder(picture)
    for bands in narrow(partial(plan_encode, height, width, 4)):
        assert_same(encode(encoder, picture, bands), exact)


def test_large_pictures_are_decoded_in_the_bands_of_the_plan(decoder: nn.Module) -> None:
    latent = noise(16, 13, 21)
    bands = plan_decode(13, 21, 4, 0)
    assert bands.passes[2][0] < 13 * 21, "attention in more than one piece"
    with torch.inference_mode():
        assert_same(decode(decoder, latent, bands), decoder(latent))


def test_norms_measure_the_whole_picture(decoder: nn.Module) -> None:
    latent = noise(16, 8, 6)
    latent[:, :, :4] *= 0.05
    latent[:, :, 4:] = 5 * latent[:, :, 4:] + 3
    with torch.no_grad():
        exact = decoder(latent)
        halves = torch.cat([decoder(latent[:, :, :4]), decoder(latent[:, :, 4:])], dim=2)
    assert (halves - exact)[:, :, :16].abs().mean() > 0.1 * exact.std(), "nothing to be wrong about"
    bands = plan_decode(8, 6, 4, 0)
    bands = replace(bands, passes=tuple((4, *rest) for _, *rest in bands.passes))
    assert_same(decode(decoder, latent, bands), exact)


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_bfloat16_is_as_close_to_the_truth_as_the_plain_forward(kind: str, request) -> None:
    original = request.getfixturevalue(f"{kind}r")
    model = type(original)().to(torch.bfloat16)
    model.load_state_dict(original.state_dict())
    x = (noise(16, 7, 6) if kind == "decode" else noise(3, 56, 48)).bfloat16()
    bands = PLANS[kind](*x.shape[2:], 2, 0)
    with torch.no_grad():
        plain = model(x)
        exact = model.float()(x.float())
    model.bfloat16()
    found = {"decode": decode, "encode": encode}[kind](model, x, bands)
    assert found.dtype == torch.bfloat16
    error = (plain - exact).norm()
    assert (found - exact).norm() <= 1.1 * error
    assert (found - plain).norm() <= 1.5 * error


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("kind", "size", "factor"),
    [(kind, 0, factor) for kind in PLANS for factor in (1, 1.5, 4, ROOMY)]
    + [(kind, 1, factor) for kind in PLANS for factor in (1.5, 11)]
    + [(kind, 2, factor) for kind in PLANS for factor in (4, ROOMY)]
    + [(kind, size, factor) for kind in PLANS for size, factor in ((3, 2), (4, 6))],
)
def test_a_run_holds_what_was_planned(
    kind: str, size: int, factor: float, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = SIZES[kind][size]
    plan = partial(PLANS[kind], height, width, itemsize)
    bands = plan(factor * plan(0).peak_bytes)
    model, x = on_meta(kind, DTYPES[itemsize], height, width)
    device, host = LiveBytes(*model.parameters(), x), LiveBytes()
    allocate = vae_bands.host_map

    def host_map(*args) -> Tensor:
        with device.paused():
            tensor = allocate(*args)
        host._count(tensor.untyped_storage())
        return tensor

    monkeypatch.setattr(vae_bands, "host_map", host_map)
    with device:
        result = {"decode": decode, "encode": encode}[kind](model, x, bands)
    assert result.shape[2:] == (
        (8 * height, 8 * width) if kind == "decode" else (height // 8, width // 8)
    )
    assert 0.85 * bands.peak_bytes <= device.peak <= bands.peak_bytes
    assert host.peak == bands.host_bytes


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("kind", "height", "width"), [(kind, *size) for kind in PLANS for size in SIZES[kind]]
)
def test_the_limit_is_kept_and_made_use_of(
    kind: str, height: int, width: int, itemsize: int
) -> None:
    plan = partial(PLANS[kind], height, width, itemsize)
    smallest, roomy = plan(0).peak_bytes, plan(ROOMY).peak_bytes
    assert plan(0.5 * smallest).peak_bytes == smallest
    for percent in range(100, 3000, 110):
        limit = smallest * percent / 100
        assert 0.9 * min(limit, roomy) <= plan(limit).peak_bytes <= limit


def test_little_memory_is_enough() -> None:
    assert plan_decode(128, 128, 2, 0).peak_bytes < 0.07e9
    assert plan_decode(256, 256, 2, 0).peak_bytes < 0.25e9
    assert plan_encode(1024, 1024, 2, 0).peak_bytes < 0.07e9
    assert plan_encode(2048, 2048, 2, 0).peak_bytes < 0.27e9
    assert plan_decode(256, 256, 2, ROOMY).peak_bytes < 6e9, "no scores of all pairs of tokens"
    # At the most 256 channels at the size of the picture and 128 beside them.
    assert plan_decode(128, 128, 2, 0).host_bytes == 3 * 128 * 1024 * 1024 * 2


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_with_enough_memory_no_map_leaves_the_device(kind: str, host_maps: list) -> None:
    run = {"decode": decode, "encode": encode}[kind]
    height, width = SIZES[kind][0]
    model, x = on_meta(kind, torch.bfloat16, height, width)
    calls = []
    bands = PLANS[kind](height, width, 2, ROOMY)
    run(model, x, bands, lambda: calls.append(None))
    assert len(calls) == len(bands.passes), "a band is a whole map"
    assert len(host_maps) == (1 if kind == "decode" else 0), "only the picture"
    run(model, x, PLANS[kind](height, width, 2, 0))
    assert len(host_maps) > 15


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_a_cancelled_run_leaves_nothing_behind(kind: str, host_maps: list) -> None:
    class Cancelled(Exception):
        pass

    def before_band() -> None:
        calls.append(None)
        if len(calls) > allowed:
            raise Cancelled

    run = {"decode": decode, "encode": encode}[kind]
    height, width = {"decode": (17, 16), "encode": (136, 128)}[kind]
    model, x = on_meta(kind, torch.bfloat16, height, width)
    bands = PLANS[kind](height, width, 2, 0)
    device = LiveBytes(*model.parameters(), x)
    in_16_bits = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    allowed, calls = 10**9, []
    run(model, x, bands, before_band)
    assert len(calls) > 2 * len(bands.passes)
    for stop in range(0, len(calls), len(calls) // 5):
        allowed, calls = stop, []
        with device, pytest.raises(Cancelled):
            run(model, x, bands, before_band)
        assert device.live == 0
        assert not any(map_() is not None for map_ in host_maps)
        assert not in_16_bits()


def test_a_picture_may_be_of_another_dtype_and_in_any_layout(encoder: nn.Module) -> None:
    picture = noise(32, 40, 3).clamp(-1, 1).movedim(-1, 1)
    with torch.no_grad():
        exact = encoder(picture)
    assert_same(encode(encoder, picture.double(), plan_encode(32, 40, 4, 0)), exact)


def test_bands_are_copied_in_one_piece(decoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is not contiguous would be gathered in memory that is not pinned first."""
    storages = set()
    allocate = vae_bands.host_map

    def host_map(*args) -> Tensor:
        storages.add((tensor := allocate(*args)).untyped_storage().data_ptr())
        kept.append(tensor)
        return tensor

    class Copies(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                pair = args[:2]
                if storages & {x.untyped_storage().data_ptr() for x in pair}:
                    self.seen += 1
                    assert all(
                        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
                        for x in pair
                    )
                    steps = [
                        [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] for x in pair
                    ]
                    assert steps[0] == steps[1]
            return func(*args, **(kwargs or {}))

    kept: list[Tensor] = []
    monkeypatch.setattr(vae_bands, "host_map", host_map)
    bands = plan_decode(3, 5, 4, 0)
    bands = replace(bands, passes=tuple((5, *rest) for _, *rest in bands.passes))
    with Copies() as copies:
        decode(decoder, noise(16, 3, 5), bands)
    assert copies.seen > 50
