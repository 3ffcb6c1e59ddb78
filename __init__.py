"""MajicFlux: Flux.1 models on small graphics cards, in ComfyUI and without it."""

if __package__:  # not set when pytest imports this file by its path
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"  # help pages, and what the canvas itself runs

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
