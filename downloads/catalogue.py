"""The model files that MajicFlux knows by name: what they are, and where they are published."""

from dataclasses import dataclass

MODELSCOPE = "modelscope"
HUGGINGFACE = "huggingface"
HUB_NAMES = {MODELSCOPE: "ModelScope", HUGGINGFACE: "Hugging Face"}

FLUX_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"
ENCODERS_LICENCE = "Apache License 2.0"


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

GROUPS: dict[str, tuple[KnownFile, ...]] = {
    "majicflus": (MAJICFLUS_BF16, MAJICFLUS_FLOAT8),
    "flux-dev-parts": (CLIP_L, T5_XXL, AE),
    "turbo": (TURBO,),  # which nothing needs: not in all
    "all": (MAJICFLUS_BF16, MAJICFLUS_FLOAT8, CLIP_L, T5_XXL, AE),
}
KNOWN_FILES = tuple({file: None for group in GROUPS.values() for file in group})


def group_of(file: KnownFile) -> str:
    """The group by which a command fetches the file with all that it needs."""
    return next(name for name in ("all", *GROUPS) if file in GROUPS[name])


def files_of(group: str, hub: str) -> list[KnownFile]:
    """The files of a group that `hub` has: of majicflus each hub has one, in its own precision."""
    return [file for file in GROUPS[group] if file.place(hub) is not None]
