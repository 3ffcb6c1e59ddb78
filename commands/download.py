"""`majicflux download`: the model files, from either hub."""

from argparse import ArgumentParser, Namespace

from ..downloads.catalogue import GROUPS, HUB_NAMES, MODELSCOPE, TRANSLATION, files_of
from ..messages import say
from .arguments import Commands, add_models


def add_to(commands: Commands, common: ArgumentParser) -> None:
    download = commands.add_parser("download", parents=[common], help="fetch the model files")
    download.add_argument("group", nargs="?", choices=GROUPS, default="all")
    download.add_argument(
        "--from",
        dest="hub",
        choices=HUB_NAMES,
        default=MODELSCOPE,
        help="modelscope has majicflus in bf16, huggingface in float8 (default: %(default)s)",
    )
    add_models(download)
    download.set_defaults(command=_download)


def _download(options: Namespace) -> None:
    from ..downloads.download import download, require_space, target_of

    files = files_of(options.group, options.hub)
    print(say("From {hub}:", hub=HUB_NAMES[options.hub]))
    for file in files:
        size = (file.size or file.least_size) / 1e9
        print(f"  {target_of(file, options.models)} ({size:.1f} GB, {file.licence})")
    require_space(files, options.hub, options.models)  # for all, so that none fails hours later
    for file in files:
        print(download(file, options.hub, options.models))
    if options.group == "translator":
        from ..translation.conversion import convert_pickled

        for path in convert_pickled(options.models / TRANSLATION):
            print(path)
