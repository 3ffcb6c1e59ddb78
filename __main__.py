"""`python FOLDER`: the command line, where Python does not find this folder as a package.

The Python of ComfyUI's portable version looks into folders of its own alone, so that `-m` finds
nothing there.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(os.path.abspath(__file__)).parent  # not resolved: a link has the package's name

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose `nodes` and `host` are nobody else's
    sys.path.append(str(FOLDER.parent))
    sys.exit(import_module(f"{FOLDER.name}.cli").main())
