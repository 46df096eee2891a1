"""Writes the options that sd-scripts' parsers accept, for the tests that have no copy of it:

    cd SD_SCRIPTS && SD_SCRIPTS_PYTHON SDTUNE/tools/kohya_options.py > SDTUNE/tests/kohya/options.txt

One line per option: its name, its kind (switch, or what its value is; * for several), its choices.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

SCRIPTS = ("train_network", "sdxl_train_network")


def kind(action: argparse.Action) -> str:
    """``switch``, ``int``, ``float *`` ..."""
    if action.nargs == 0:
        return "switch"
    name = getattr(action.type, "__name__", "str")
    return f"{name} *" if action.nargs == "*" else name


def main() -> None:
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    options: dict[str, list[str]] = {}
    for script in SCRIPTS:
        for action in importlib.import_module(script).setup_parser()._actions:
            choices = " ".join(str(choice) for choice in action.choices or () if choice is not None)
            for name in action.option_strings:
                row = "  ".join(filter(None, (name, kind(action), choices)))
                options.setdefault(row, []).append(script)
    for row, scripts in sorted(options.items()):
        print(row if len(scripts) == len(SCRIPTS) else f"{row}  # {scripts[0]} only")


if __name__ == "__main__":
    main()
