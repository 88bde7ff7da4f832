"""`python -m narrowgauge`: the command line, and the three paths that a C or C++ build asks for.

The paths lie inside the installed package, beside the extension module, and hold the headers, the static library,
its CMake package and its pkg-config file. Printing them needs no extra.
"""

import importlib.util
import sys
from pathlib import Path

_PATHS = {
    "--cmake-dir": "lib/cmake/narrowgauge",
    "--pkg-config-dir": "lib/pkgconfig",
    "--include-dir": "include",
}


def main() -> int:
    if len(sys.argv) == 2 and sys.argv[1] in _PATHS:
        native = importlib.util.find_spec("narrowgauge._native")
        assert native is not None and native.origin is not None  # importing the package has loaded it
        print(Path(native.origin).parent / _PATHS[sys.argv[1]])
        return 0
    from narrowgauge.cli import main as run_cli

    return run_cli()


if __name__ == "__main__":
    sys.exit(main())
