"""The model files that MajicFlux knows by name: what they are, and where they are published."""

from dataclasses import dataclass
from typing import Any

MODELSCOPE = "modelscope"
HUGGINGFACE = "huggingface"
HUB_NAMES = {MODELSCOPE: "ModelScope", HUGGINGFACE: "Hugging Face"}

FLUX_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"
ENCODERS_LICENCE = "Apache License 2.0"
TRANSLATOR_LICENCE = "CC-BY-4.0"


@dataclass(frozen=True)
class Place:
    """Where a file is published: the hub, the repository there, the path in it, the revision."""

    hub: str  # one of HUB_NAMES
    repository: str
    path: str
    revision: str

    @property
    def page(self) -> str:
        """Where a browser finds it."""
        if self.hub == MODELSCOPE:
            return f"https://www.modelscope.cn/models/{self.repository}/files"
        folder = self.path.rpartition("/")[0]
        tree = f"/tree/{self.revision}/{folder}" if folder else ""
        return f"https://huggingface.co/{self.repository}{tree}"


@dataclass(frozen=True)
class KnownFile:
    """A model file by the name that ComfyUI shows, with its folder under the models folder."""

    name: str
    folder: str
    licence: str
    places: tuple[Place, ...]
    size: int | None = None  # bytes of the whole file
    least_size: int = 0  # bytes of its tensors alone, where the whole is not known
    sha256: str | None = None  # in lower-case hex

    def place(self, hub: str) -> Place | None:
        """Where `hub` has this file, or None."""
        return next((place for place in self.places if place.hub == hub), None)


# A size or a hash is given only where it was published; None means that nobody could check it.

# Its size is not known. 780 tensors in bf16 are 23,802,816,640 bytes, the header comes on top.
MAJICFLUS_BF16 = KnownFile(
    "majicflus_v134.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (Place(MODELSCOPE, "MAILAND/majicflus_v1", "majicflus_v134.safetensors", "master"),),
    least_size=23_802_816_640,
)
# Size and hash of the file in this repository of Hugging Face.
MAJICFLUS_FLOAT8 = KnownFile(
    "majicflus_v1.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (Place(HUGGINGFACE, "Shakker-Labs/majicflus_v1", "majicflus_v1.safetensors", "main"),),
    size=11_901_513_960,
    sha256="062dad72b2fee99af172463b3a2c84c1da793aaf80eaa0543138e05be55cdbbf",
)
# The next three: size and hash by which several public installers pin these files of these Hugging
# Face repositories. The copies on ModelScope were not looked at; they are held to the same values.
CLIP_L = KnownFile(
    "clip_l.safetensors",
    "text_encoders",
    ENCODERS_LICENCE,
    (
        Place(MODELSCOPE, "AI-ModelScope/flux_text_encoders", "clip_l.safetensors", "master"),
        Place(HUGGINGFACE, "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "main"),
    ),
    size=246_144_152,
    sha256="660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd",
)
T5_XXL = KnownFile(
    "t5xxl_fp16.safetensors",
    "text_encoders",
    ENCODERS_LICENCE,
    (
        Place(MODELSCOPE, "AI-ModelScope/flux_text_encoders", "t5xxl_fp16.safetensors", "master"),
        Place(HUGGINGFACE, "comfyanonymous/flux_text_encoders", "t5xxl_fp16.safetensors", "main"),
    ),
    size=9_787_841_024,
    sha256="6e480b09fae049a72d2a8c5fbccb8d3e92febeb233bbe9dfe7256958a9167635",
)
AE = KnownFile(
    "ae.safetensors",
    "vae",
    FLUX_DEV_LICENCE,
    (
        Place(MODELSCOPE, "black-forest-labs/FLUX.1-dev", "ae.safetensors", "master"),
        Place(
            HUGGINGFACE,
            "Comfy-Org/Lumina_Image_2.0_Repackaged",
            "split_files/vae/ae.safetensors",
            "main",
        ),
    ),
    size=335_304_388,
    sha256="afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
)
# Makes eight steps do for twenty. Size and hash by which several public installers pin the file.
TURBO = KnownFile(
    "FLUX.1-Turbo-Alpha.safetensors",
    "loras",
    FLUX_DEV_LICENCE,
    tuple(
        Place(
            hub,
            "alimama-creative/FLUX.1-Turbo-Alpha",
            "diffusion_pytorch_model.safetensors",
            revision,
        )
        for hub, revision in ((MODELSCOPE, "master"), (HUGGINGFACE, "main"))
    ),
    size=694_082_424,
    sha256="77f7523a5e9c3da6cfc730c6b07461129fa52997ea06168e9ed5312228aa0bff",
)
# What takes a picture. Hashes as Black Forest Labs publish them, sizes as public installers do; the
# copies of other people are held to both.
KONTEXT_BF16 = KnownFile(
    "flux1-kontext-dev.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (
        Place(
            MODELSCOPE,
            "black-forest-labs/FLUX.1-Kontext-dev",
            "flux1-kontext-dev.safetensors",
            "master",
        ),
    ),
    size=23_802_947_360,
    sha256="843a26dc765d3105dba081c30bce7b14c65b0988f9e8d14e9fbc8856a6deebd5",
)
KONTEXT_FLOAT8 = KnownFile(
    "flux1-dev-kontext_fp8_scaled.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (
        Place(
            HUGGINGFACE,
            "Comfy-Org/flux1-kontext-dev_ComfyUI",
            "split_files/diffusion_models/flux1-dev-kontext_fp8_scaled.safetensors",
            "main",
        ),
    ),
    size=11_904_640_136,
    sha256="630ba795ec64283b4230ea23cf79406c2c68b7c578229ed139f30043eadb30a2",
)
FILL = KnownFile(
    "flux1-fill-dev.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (
        Place(
            MODELSCOPE, "black-forest-labs/FLUX.1-Fill-dev", "flux1-fill-dev.safetensors", "master"
        ),
        Place(
            HUGGINGFACE,
            "Comfy-Org/flux1-dev",
            "split_files/diffusion_models/flux1-fill-dev.safetensors",
            "main",
        ),
    ),
    size=23_804_922_408,
    sha256="03e289f530df51d014f48e675a9ffa2141bc003259bf5f25d75b957e920a41ca",
)
# Its size is not known. 780 tensors in bf16 are so many bytes, the header comes on top.
DEPTH = KnownFile(
    "flux1-depth-dev.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (
        Place(MODELSCOPE, "licyks/flux_controlnet", "flux1-depth-dev.safetensors", "master"),
        Place(
            HUGGINGFACE, "black-forest-labs/FLUX.1-Depth-dev", "flux1-depth-dev.safetensors", "main"
        ),
    ),
    least_size=23_803_209_856,
    sha256="41360d1662f44ca45bc1b665fe6387e91802f53911001630d970a4f8be8dac21",
)
CANNY = KnownFile(
    "flux1-canny-dev.safetensors",
    "diffusion_models",
    FLUX_DEV_LICENCE,
    (
        Place(MODELSCOPE, "licyks/flux_controlnet", "flux1-canny-dev.safetensors", "master"),
        Place(
            HUGGINGFACE,
            "Comfy-Org/flux1-dev",
            "split_files/diffusion_models/flux1-canny-dev.safetensors",
            "main",
        ),
    ),
    size=23_803_351_736,
    sha256="996876670169591cb412b937fbd46ea14cbed6933aef17c48a2dcd9685c98cdb",
)
DEPTH_LORA = KnownFile(
    "flux1-depth-dev-lora.safetensors",
    "loras",
    FLUX_DEV_LICENCE,
    (
        Place(MODELSCOPE, "licyks/flux_controlnet", "flux1-depth-dev-lora.safetensors", "master"),
        Place(
            HUGGINGFACE,
            "Comfy-Org/flux1-dev",
            "split_files/loras/flux1-depth-dev-lora.safetensors",
            "main",
        ),
    ),
    size=1_244_440_512,
    sha256="1938b38ea0fdd98080fa3e48beb2bedfbc7ad102d8b65e6614de704a46d8b907",
)
CANNY_LORA = KnownFile(
    "flux1-canny-dev-lora.safetensors",
    "loras",
    FLUX_DEV_LICENCE,
    (
        Place(MODELSCOPE, "licyks/flux_controlnet", "flux1-canny-dev-lora.safetensors", "master"),
        Place(
            HUGGINGFACE,
            "black-forest-labs/FLUX.1-Canny-dev-lora",
            "flux1-canny-dev-lora.safetensors",
            "main",
        ),
    ),
    size=1_244_443_944,
    sha256="8eaa21b9c43d5e7242844deb64b8cf22ae9010f813f955ca8c05f240b8a98f7e",
)
REDUX = KnownFile(
    "flux1-redux-dev.safetensors",
    "style_models",
    FLUX_DEV_LICENCE,
    (
        Place(
            MODELSCOPE,
            "black-forest-labs/FLUX.1-Redux-dev",
            "flux1-redux-dev.safetensors",
            "master",
        ),
        Place(HUGGINGFACE, "Comfy-Org/Flux1-Redux-Dev", "flux1-redux-dev.safetensors", "main"),
    ),
    size=129_063_232,
    sha256="a1b3bdcb4bdc58ce04874b9ca776d61fc3e914bb6beab41efb63e4e2694dca45",
)
# What Redux sees with.
SIGCLIP = KnownFile(
    "sigclip_vision_patch14_384.safetensors",
    "clip_vision",
    ENCODERS_LICENCE,
    (
        Place(
            MODELSCOPE, "licyks/flux_controlnet", "sigclip_vision_patch14_384.safetensors", "master"
        ),
        Place(
            HUGGINGFACE,
            "Comfy-Org/sigclip_vision_384",
            "sigclip_vision_patch14_384.safetensors",
            "main",
        ),
    ),
    size=856_505_640,
    sha256="1fee501deabac72f0ed17610307d7131e3e9d1e838d0363aa3c2b97a6e03fb33",
)


def _control_net(name: str, modelscope: str, huggingface: str, **known: Any) -> KnownFile:
    """Published under the name of Diffusers in a repository of its own, on each hub."""
    places = (MODELSCOPE, modelscope, "master"), (HUGGINGFACE, huggingface, "main")
    path = "diffusion_pytorch_model.safetensors"
    found = tuple(Place(hub, repository, path, revision) for hub, repository, revision in places)
    return KnownFile(f"{name}.safetensors", "controlnet", FLUX_DEV_LICENCE, found, **known)


UNION_PRO_2 = _control_net(
    "FLUX.1-dev-ControlNet-Union-Pro-2.0",
    "LiblibAI/FLUX.1-dev-ControlNet-Union-Pro-2.0",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
    size=4_281_779_224,
    sha256="9d03f63f36206bab2f36aed5cfedc8693c2881397534e9d5f9ae9a0a41362517",
)
UNION_PRO = _control_net(
    "FLUX.1-dev-ControlNet-Union-Pro",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro",
    size=6_603_953_920,
)
# The hash as one public installer pins it; the size is that of the tensors in bf16.
INPAINTING_NET = _control_net(
    "FLUX.1-dev-Controlnet-Inpainting-Beta",
    "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta",
    "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta",
    least_size=4_281_778_176,
    sha256="ca46c5f7b5de02caee7c069f2aedbf628af8def8578319ceae3be1588d448448",
)

# A translator of prompts, in a folder of its own. The repositories on both hubs were not looked at;
# the weights are at least the tensors of a model of these sizes, in float32.
TRANSLATION, TRANSLATOR = "translation", "opus-mt-zh-en"
OPUS_MT_ZH_EN = tuple(
    KnownFile(
        name,
        f"{TRANSLATION}/{TRANSLATOR}",
        TRANSLATOR_LICENCE,
        (
            Place(MODELSCOPE, f"AI-ModelScope/{TRANSLATOR}", name, "master"),
            Place(HUGGINGFACE, f"Helsinki-NLP/{TRANSLATOR}", name, "main"),
        ),
        least_size=least_size,
    )
    for name, least_size in (
        ("config.json", 2),
        ("generation_config.json", 2),
        ("tokenizer_config.json", 2),
        ("vocab.json", 100_000),
        ("source.spm", 100_000),
        ("target.spm", 100_000),
        ("pytorch_model.bin", 309_000_000),
    )
)

GROUPS: dict[str, tuple[KnownFile, ...]] = {
    "majicflus": (MAJICFLUS_BF16, MAJICFLUS_FLOAT8),
    "flux-dev-parts": (CLIP_L, T5_XXL, AE),
    # What nothing needs, and is not in all.
    "turbo": (TURBO,),
    "kontext": (KONTEXT_BF16, KONTEXT_FLOAT8),
    "fill": (FILL,),
    "depth": (DEPTH,),
    "canny": (CANNY,),
    "depth-lora": (DEPTH_LORA,),
    "canny-lora": (CANNY_LORA,),
    "redux": (REDUX, SIGCLIP),
    "controlnet": (UNION_PRO_2,),
    "controlnet-union": (UNION_PRO,),
    "controlnet-inpainting": (INPAINTING_NET,),
    "translator": OPUS_MT_ZH_EN,
    "all": (MAJICFLUS_BF16, MAJICFLUS_FLOAT8, CLIP_L, T5_XXL, AE),
}
# Those that are chosen in a node by name: of a translator that is the folder.
KNOWN_FILES = tuple(
    {f: None for group in GROUPS.values() for f in group if group is not OPUS_MT_ZH_EN}
)
# One of each group stands in for another: each hub has it in a precision of its own.
SISTERS = (GROUPS["majicflus"], GROUPS["kontext"])


def group_of(file: KnownFile) -> str:
    """The group by which a command fetches the file with all that it needs."""
    return next(name for name in ("all", *GROUPS) if file in GROUPS[name])


def files_of(group: str, hub: str) -> list[KnownFile]:
    """The files of a group that `hub` has: of majicflus and Kontext each hub has one, in its own
    precision."""
    return [file for file in GROUPS[group] if file.place(hub) is not None]
