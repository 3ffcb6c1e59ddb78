"""The nodes as an API: ids, names, sockets and their order. Shared workflows depend on them."""

import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import tqdm
from safetensors.torch import load_file, save_file

from majicflux.downloads import model_folders
from majicflux.downloads.catalogue import GROUPS, KNOWN_FILES, KnownFile
from majicflux.engine.kernels import dispatch
from majicflux.host import standalone
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.nodes import NODES, model_files
from majicflux.nodes.dit_loader import DiTLoader
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import Sample
from majicflux.nodes.text_encoders import TextEncodersNode
from majicflux.nodes.vae_loader import VAELoader

CONTRACT = {
    "MajicFluxDiTLoader": (
        "Majic float8 DiT loader",
        [
            "file:COMBO",
            "weight_precision:COMBO",
            "keep_prepared:BOOLEAN",
            "attention_precision:COMBO",
            "mlp_precision:COMBO",
            "modulation_precision:COMBO",
        ],
        ["MAJICFLUX_DIT"],
    ),
    "MajicFluxLoRA": (
        "LoRA",
        [
            "dit:MAJICFLUX_DIT",
            "file:COMBO",
            "strength:FLOAT",
            "text_encoders:MAJICFLUX_TEXT_ENCODERS",
            "keep:BOOLEAN",
        ],
        ["MAJICFLUX_DIT", "MAJICFLUX_TEXT_ENCODERS"],
    ),
    "MajicFluxControlNet": (
        "ControlNet",
        [
            "file:COMBO",
            "weight_precision:COMBO",
            "image:IMAGE",
            "strength:FLOAT",
            "start:FLOAT",
            "end:FLOAT",
            "mode:COMBO",
            "mask:MASK",
            "keep_prepared:BOOLEAN",
            "control:MAJICFLUX_CONTROL",
        ],
        ["MAJICFLUX_CONTROL"],
    ),
    "MajicFluxTextEncoders": (
        "bf16 text encoders",
        ["clip_l:COMBO", "t5:COMBO", "precision:COMBO", "keep_prepared:BOOLEAN"],
        ["MAJICFLUX_TEXT_ENCODERS"],
    ),
    "MajicFluxVAELoader": ("Flux VAE", ["file:COMBO"], ["MAJICFLUX_VAE"]),
    "MajicFluxPipeline": (
        "CPU-offload pipeline",
        [
            "dit:MAJICFLUX_DIT",
            "text_encoders:MAJICFLUX_TEXT_ENCODERS",
            "vae:MAJICFLUX_VAE",
            "vram_budget_gb:FLOAT",
            "compute_precision:COMBO",
            "int8_attention:COMBO",
        ],
        ["MAJICFLUX_PIPELINE"],
    ),
    "MajicFluxTranslate": (
        "translate prompt",
        ["prompt:STRING", "model:COMBO"],
        ["STRING"],
    ),
    "MajicFluxSample": (
        "sample",
        [
            "pipeline:MAJICFLUX_PIPELINE",
            "prompt:STRING",
            "seed:INT",
            "steps:INT",
            "guidance:FLOAT",
            "width:INT",
            "height:INT",
            "batch_size:INT",
            "negative_prompt:STRING",
            "cfg:FLOAT",
            "solver:COMBO",
            "schedule:COMBO",
            "size:COMBO",
            "image:IMAGE",
            "latent:LATENT",
            "mask:MASK",
            "strength:FLOAT",
            "keep_unmasked:BOOLEAN",
            "positive:CONDITIONING",
            "negative:CONDITIONING",
            "sigmas:SIGMAS",
            "reference:IMAGE",
            "control:MAJICFLUX_CONTROL",
            "reuse:COMBO",
            "reused_steps:STRING",
        ],
        ["IMAGE", "LATENT"],
    ),
    "MajicFluxEncodePrompt": (
        "encode prompt",
        ["pipeline:MAJICFLUX_PIPELINE", "prompt:STRING", "guidance:FLOAT"],
        ["CONDITIONING"],
    ),
    "MajicFluxEncodeImage": (
        "encode image",
        ["pipeline:MAJICFLUX_PIPELINE", "image:IMAGE"],
        ["LATENT"],
    ),
    "MajicFluxDenoise": (
        "denoise",
        [
            "pipeline:MAJICFLUX_PIPELINE",
            "positive:CONDITIONING",
            "latent:LATENT",
            "seed:INT",
            "steps:INT",
            "guidance:FLOAT",
            "negative:CONDITIONING",
            "cfg:FLOAT",
            "solver:COMBO",
            "schedule:COMBO",
            "strength:FLOAT",
            "start_at_step:INT",
            "end_at_step:INT",
            "add_noise:BOOLEAN",
            "sigmas:SIGMAS",
            "control:MAJICFLUX_CONTROL",
            "reuse:COMBO",
            "reused_steps:STRING",
        ],
        ["LATENT"],
    ),
    "MajicFluxDecode": (
        "decode",
        ["pipeline:MAJICFLUX_PIPELINE", "latent:LATENT"],
        ["IMAGE"],
    ),
    "MajicFluxCompare": (
        "compare pictures",
        ["reference:IMAGE", "image:IMAGE"],
        ["IMAGE", "STRING"],
    ),
    "MajicFluxDoctor": ("MajicFlux doctor", [], ["STRING"]),
}


@pytest.fixture(autouse=True)
def models_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)


def test_ids_names_and_sockets_are_as_published() -> None:
    found = {
        s.node_id: (
            s.display_name,
            [f"{i.id}:{i.io_type}" for i in s.inputs],
            [o.io_type for o in s.outputs],
        )
        for s in (node.define_schema() for node in NODES)
    }
    assert found == CONTRACT


@pytest.mark.parametrize("node", NODES)
def test_everything_shown_is_explained(node: type) -> None:
    schema = node.define_schema()
    assert schema.description
    assert any(re.search("[\u4e00-\u9fff]", alias) for alias in schema.search_aliases)
    for socket in (*schema.inputs, *schema.outputs):
        assert socket.options.get("tooltip"), socket.id


def test_files_come_from_the_models_folder() -> None:
    file = DiTLoader.define_schema().inputs[0]
    assert file.options["options"] == ["majicflus_v134.safetensors"]
    clip, t5, *_ = TextEncodersNode.define_schema().inputs
    assert clip.options["default"] == "clip_l.safetensors"
    assert t5.options["default"] == "t5xxl_fp16.safetensors"


def test_a_folder_of_shards_is_one_choice(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text_encoders" / "text_encoder_2"
    folder.mkdir(parents=True)
    for index in (1, 2):
        (folder / f"model-{index:05d}-of-00002.safetensors").touch()
    (tmp_path / "text_encoders" / "clip_l.safetensors").touch()
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    assert model_files.options("text_encoders")["options"] == [
        "clip_l.safetensors",
        "text_encoder_2",
    ]
    assert model_folders.resolve("text_encoders", "text_encoder_2") == folder


def test_what_the_system_hides_is_no_choice(models, tmp_path, monkeypatch) -> None:
    """macOS writes `._NAME` beside each file on other disks; that would come first."""
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    folder = tmp_path / "text_encoders"
    shards = folder / "text_encoder_2"
    shards.mkdir(parents=True)
    tensors = load_file(models / "text_encoders" / "t5xxl_fp16.safetensors")
    names = sorted(tensors)
    for index, some in enumerate((names[:9], names[9:]), start=1):
        name = f"model-{index:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in some}, shards / name)
        (shards / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    (folder / "._clip_l.safetensors").write_bytes(b"\x00\x05\x16\x07")
    shutil.copy(models / "text_encoders" / "clip_l.safetensors", folder)
    for hidden in (folder / ".Trash-1000", tmp_path / "checkpoints" / ".cache" / "hub"):
        hidden.mkdir(parents=True)
        (hidden / "clip_l.safetensors").touch()
    found = model_files.options("text_encoders", "clip_l")
    assert found == {
        "options": ["clip_l.safetensors", "text_encoder_2"], "default": "clip_l.safetensors"
    }  # fmt: skip
    assert TextEncodersNode.validate_inputs("clip_l.safetensors", "text_encoder_2") is True


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_looked_into_without_end(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    (tmp_path / "vae" / "deep").mkdir(parents=True)
    (tmp_path / "vae" / "mine").symlink_to(models / "vae")
    (tmp_path / "vae" / "deep" / "again").symlink_to(tmp_path / "vae")
    (tmp_path / "vae" / "lost").symlink_to(tmp_path / "nowhere")
    assert model_files.options("vae")["options"] == ["mine/ae.safetensors"]
    assert VAELoader.validate_inputs("mine/ae.safetensors") is True


def test_whole_checkpoints_are_offered_last_in_every_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoints/a_flux_all_in_one.safetensors", "vae/z.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    checkpoint = "a_flux_all_in_one.safetensors"
    assert model_files.options("vae")["options"] == ["z.safetensors", checkpoint]
    for category in ("diffusion_models", "text_encoders", "vae"):
        path = model_folders.resolve(category, checkpoint)
        assert path == tmp_path / "checkpoints" / checkpoint


@pytest.mark.parametrize("name", ["../vae/ae.safetensors", "/etc/passwd", "none.safetensors", ""])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ModelFileError, match=r"is not in models/diffusion_models\. Put it there"):
        model_folders.resolve("diffusion_models", name)


@pytest.mark.parametrize("file", KNOWN_FILES, ids=lambda file: file.name)
def test_a_missing_file_is_named_with_its_folder_and_its_pages(
    file: KnownFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    with pytest.raises(ModelFileError) as caught:
        model_folders.resolve(file.folder, file.name)
    sentence, *more = str(caught.value).splitlines()
    assert sentence.startswith(f"{file.name} is not in models/{file.folder}.")
    *pages, fetch, _, folder = more[1:]
    assert pages == [place.page for place in file.places]
    assert all(place.repository in place.page for place in file.places)
    group = "all" if file in GROUPS["all"] else next(n for n in GROUPS if file in GROUPS[n])
    pack = Path(model_files.__file__).parents[1]
    command = f'python "{pack}" download {group} --models "{tmp_path}"'
    assert fetch == f"Or run {command} with ComfyUI's own Python."
    assert folder == str(tmp_path / file.folder)


@pytest.mark.parametrize("folder", ["diffusion_models", "checkpoints"])
@pytest.mark.parametrize(("wanted", "there"), [
    (wanted, there) for group in ("majicflus", "kontext")
    for wanted in GROUPS[group] for there in GROUPS[group]
], ids=lambda file: file.name)  # fmt: skip
def test_either_file_of_majicflus_or_kontext_stands_in_for_the_other(
    models: Path, tmp_path: Path, monkeypatch, wanted: KnownFile, there: KnownFile, folder: str
) -> None:
    """Each hub has another one, and a workflow names but one of them."""
    place = tmp_path / folder / there.name
    place.parent.mkdir()
    shutil.copy(models / "diffusion_models" / "majicflus_v134.safetensors", place)
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    assert DiTLoader.validate_inputs(wanted.name) is True
    assert model_folders.resolve("diffusion_models", wanted.name) == place
    for other in ("flux1-dev.safetensors", f"mine/{wanted.name}", f"my_{wanted.name}"):
        with pytest.raises(ModelFileError, match=f"{other} is not in models/diffusion_models"):
            model_folders.resolve("diffusion_models", other)


def test_the_file_that_was_chosen_comes_before_its_sister(tmp_path: Path, monkeypatch) -> None:
    names = [file.name for file in GROUPS["majicflus"]]
    (tmp_path / "diffusion_models").mkdir()
    for name in names:
        (tmp_path / "diffusion_models" / name).touch()
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    assert [model_folders.resolve("diffusion_models", name).name for name in names] == names


def test_loaders_are_refused_before_the_run_by_the_header() -> None:
    assert DiTLoader.validate_inputs("majicflus_v134.safetensors") is True
    assert "is not in models/diffusion_models" in DiTLoader.validate_inputs("gone.safetensors")
    good = ("clip_l.safetensors", "t5xxl_fp16.safetensors")
    assert TextEncodersNode.validate_inputs(*good) is True
    swapped = TextEncodersNode.validate_inputs(*reversed(good))
    assert swapped.startswith("t5xxl_fp16.safetensors is a T5 text encoder, not a CLIP")
    assert VAELoader.validate_inputs("ae.safetensors") is True


@pytest.mark.parametrize("name", [5, 1.5, True, [], {}, "a\0b", "x" * 5000])
def test_a_name_that_can_be_none_is_refused_in_words(name: object) -> None:
    refused = "is not in models/"
    assert refused in DiTLoader.validate_inputs(name)
    assert refused in VAELoader.validate_inputs(name)
    assert refused in TextEncodersNode.validate_inputs("clip_l.safetensors", name)
    assert refused in TextEncodersNode.validate_inputs(name, "t5xxl_fp16.safetensors")


def test_a_name_that_comes_over_a_link_is_left_to_the_run() -> None:
    assert DiTLoader.validate_inputs(None) is VAELoader.validate_inputs(None) is True
    assert TextEncodersNode.validate_inputs(None, None) is True
    wrong = TextEncodersNode.validate_inputs(None, "clip_l.safetensors")
    assert wrong.startswith("clip_l.safetensors is a CLIP text encoder")
    assert VAELoader.fingerprint_inputs(None) is None, "the node that it comes from has its own"
    assert DiTLoader.fingerprint_inputs(None, "bfloat16") is None
    with pytest.raises(ModelFileError, match=r"gone\.safetensors is not in models/vae"):
        VAELoader.execute("gone.safetensors")
    with pytest.raises(ModelFileError, match="is a CLIP text encoder, not a T5"):
        TextEncodersNode.execute("clip_l.safetensors", "clip_l.safetensors", "bfloat16")


def test_a_replaced_file_is_loaded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vae" / "ae.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"1")
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    before = VAELoader.fingerprint_inputs("ae.safetensors")
    assert VAELoader.fingerprint_inputs("ae.safetensors") == before
    path.write_bytes(b"22")
    assert VAELoader.fingerprint_inputs("ae.safetensors") != before


def test_sizes_may_be_any_whole_number_that_can_be_rounded() -> None:
    """ComfyUI checks the limits, and names the input: there is nothing to validate."""
    inputs = {socket.id: socket.options for socket in Sample.define_schema().inputs}
    for name in ("width", "height"):
        limits = [inputs[name][limit] for limit in ("min", "max", "step")]
        assert limits == [16, 8192, 16]
    assert not hasattr(Sample, "validate_inputs")


def handles(weight: str = "float8_e4m3fn", text: str = "bfloat16") -> tuple:
    dit = DiTLoader.execute("majicflus_v134.safetensors", weight).args[0]
    encoders = TextEncodersNode.execute("clip_l.safetensors", "t5xxl_fp16.safetensors", text)
    return dit, encoders.args[0], VAELoader.execute("ae.safetensors").args[0]


def test_every_precision_does_what_it_says() -> None:
    dit, encoders, vae = handles("bfloat16", "float32")
    assert dit.weights.module.blocks[0].ff_a[0].weight.dtype == torch.bfloat16
    assert {p.dtype for p in encoders.weights.module.parameters()} == {torch.float32}
    computed = {
        precision: PipelineNode.execute(dit, encoders, vae, 0.0, precision).args[0].compute.dtype
        for precision in ("auto", "bfloat16", "float32")
    }
    assert computed == {
        "auto": torch.float32,  # on a CPU, as ComfyUI has it
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }
    assert handles()[0].weights.module.blocks[0].ff_a[0].weight.dtype == torch.float8_e4m3fn


def test_the_budget_is_in_gigabytes_and_zero_means_the_hosts() -> None:
    parts = handles()
    assert PipelineNode.execute(*parts, 0.0, "auto").args[0].budget_bytes is None
    assert PipelineNode.execute(*parts, 2.5, "auto").args[0].budget_bytes == 2.5 * 2**30


@pytest.fixture(scope="module")
def loaded(models: Path) -> Iterator[tuple]:
    """Holds them, so that whatever samples finds them loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "models_folder", models)
        yield handles()


def sampled(prompt: str = "a cat", seed: int = 0, guidance: float = 3.5, steps: int = 2, **size):
    pipeline = PipelineNode.execute(*handles(), 0.0, "auto").args[0]
    width, height = size.get("width", 64), size.get("height", 48)
    batch = size.get("batch_size", 1)
    return Sample.execute(pipeline, prompt, seed, steps, guidance, width, height, batch).args


@pytest.mark.usefixtures("loaded")
def test_image_and_latent_have_comfyuis_form() -> None:
    image, latent = sampled(batch_size=2)
    assert image.shape == (2, 48, 64, 3)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert latent["samples"].shape == (2, 16, 6, 8)
    assert latent["samples"].dtype == torch.float32


@pytest.mark.usefixtures("loaded")
def test_every_input_changes_the_picture() -> None:
    base = sampled()[0]
    assert torch.equal(sampled()[0], base)
    for change in ({"prompt": "a dog"}, {"seed": 1}, {"guidance": 1.0}, {"steps": 3}):
        assert not torch.equal(sampled(**change)[0], base), change


@pytest.mark.usefixtures("loaded")
def test_an_empty_prompt_is_allowed() -> None:
    assert torch.isfinite(sampled(prompt="")[0]).all()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 15}, "width must be 16 to 8192, not 15"),
        ({"height": 8200}, "height must be 16 to 8192, not 8200"),
        ({"steps": 0}, "steps must be 1 to 100, not 0"),
        ({"seed": -2}, "seed must be -1 to 18446744073709551615, not -2"),
        ({"seed": 2**64}, "seed must be -1 to"),
        ({"batch_size": 0}, "batch_size must be 1 to 64, not 0"),
    ],
)
def test_values_that_come_over_a_link_are_checked_too(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sampled(**change)


@pytest.mark.usefixtures("loaded")
def test_the_largest_seed_works() -> None:
    assert torch.isfinite(sampled(seed=2**64 - 1)[0]).all()


def test_each_kind_of_layer_can_be_stored_otherwise() -> None:
    file = "majicflus_v134.safetensors"
    for kind, layer in (
        ("attention", lambda dit: dit.blocks[0].attn.a_to_qkv),
        ("mlp", lambda dit: dit.single_blocks[0].proj_out),
        ("modulation", lambda dit: dit.blocks[0].norm1_b.linear),
    ):
        chosen = {f"{kind}_precision": "int8 rotated"}
        dit = DiTLoader.execute(file, "float8_e4m3fn", **chosen).args[0]
        assert layer(dit.weights.module).weight.dtype == torch.int8, kind
        others = {p.dtype for p in dit.weights.module.parameters() if p.ndim == 2}
        assert torch.float8_e4m3fn in others


def test_the_pipeline_shows_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "node_text", lambda lines, **values: ("\n".join(lines), values))
    parts = handles("int8 rotated")
    done = PipelineNode.execute(*parts, 0.0, "8-bit")
    assert done.args[0].compute.eight_bit == {torch.int8}
    text = "transformer: computes in int8 on CPU\non the CPU: no VRAM is used"
    assert done.ui == (text, {}), "no plan to draw"
    text, _ = PipelineNode.execute(*parts, 0.0, "auto").ui
    assert text.splitlines()[0] == (
        "transformer: computes in float32 on CPU (no 8-bit matrix units for int8 weights)"
    )
    with pytest.raises(ValueError, match="Choose float8_e4m3fn or int8 rotated"):
        PipelineNode.execute(*handles("bfloat16"), 0.0, "8-bit")


def test_loading_is_told_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = standalone.loading_progress(None)
    told(0, 20_000_000_000, "reading and converting {done:.1f} of {total:.1f} GB")
    told(20_000_000_000, 20_000_000_000, "keeping {total:.1f} GB on disk")
    shown = capsys.readouterr().err
    assert "preparing to load" in shown
    assert "keeping 20.0 GB on disk: 100%" in shown


@pytest.mark.parametrize("passes", [3, 5, 6])
def test_steps_are_counted_on_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0))
    told = standalone.progress(passes, 3, torch.device("cpu"), None)
    for _ in range(passes):
        told(torch.zeros(1))
    counted = re.findall(r"\| ([\d.]+)/3 ", capsys.readouterr().err)
    assert sorted({*counted}) == ["0", "1", "2", "3"]


def test_kernels_are_tried_while_the_first_weights_are_read(monkeypatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(dispatch, "try_ahead", lambda _: events.append("tried"))

    def load() -> type:
        events.append("read")
        return type("Handle", (), {})

    kept = model_files.shared(load, "some file", 1)
    assert model_files.shared(load, "some file", 1) is kept
    assert events == ["tried", "read"]
