"""`majicflux cache`: the prepared weights on the disk."""

import sys
from argparse import ArgumentParser, Namespace

from ..host import standalone
from ..messages import say
from .arguments import Commands, add_models


def add_to(commands: Commands, common: ArgumentParser) -> None:
    cache = commands.add_parser("cache", parents=[common], help="list or remove prepared weights")
    cache.add_argument("action", choices=["list", "clear"])
    add_models(cache)
    cache.set_defaults(command=_cache)


def _cache(options: Namespace) -> None:
    from ..loaders.weight_cache import cached_files, clear_cache

    standalone.models_folder = options.models
    folder = standalone.prepared_folder()
    if options.action == "clear":
        freed = clear_cache(folder) / 1e9
        print(say("{freed:.2f} GB freed in {folder}", freed=freed, folder=folder))
        return
    files = cached_files(folder)
    if not files:
        print(say("No prepared weights are in {folder}.", folder=folder), file=sys.stderr)
    for path in files:
        print(f"{path.stat().st_size / 1e9:8.2f} GB  {path}")
