"""The one entry point: ``python -m examples.yolo_world COMMAND ...``, also under torchrun and accelerate launch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "quickstart": ("quickstart", "one adapter from plan to merge, in the fewest lines"),
    "demo": ("demo", "two adapters on one frozen base, against full fine-tuning; then swapped and merged"),
    "train": ("commands.train", "train one adapter; resumable, in one process or several"),
    "evaluate": ("commands.evaluate", "COCO's numbers of the base and of adapters"),
    "predict": ("commands.predict", "find defects on images; writes pictures and JSON"),
    "merge": ("commands.merge", "merge adapters into a plain checkpoint, and into ONNX"),
    "tune": ("commands.tune", "search for rank or reduction, learning rate and positions"),
    "compare": ("commands.compare", "all specs side by side, with full fine-tuning and the head alone"),
    "ensemble": ("commands.ensemble", "one detector of several adapters"),
    "generate": ("data.generate", "write a generated data set in MVTec AD's layout"),
    "labelme": ("data.labelme", "turn labelme's JSON files into one COCO file"),
}
"""Each command with its module and what it does; the module's ``main`` takes the rest of the line."""


def listing() -> str:
    """Return the commands with a line on each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m examples.yolo_world COMMAND ...", "", *lines, "", "COMMAND --help shows options."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(listing())
        return 0
    if not words or words[0] not in COMMANDS:
        print(f"error: {words[0]!r} is no command." if words else "error: which command?", file=sys.stderr)
        print(listing(), file=sys.stderr)
        return 2
    return importlib.import_module(f"{__package__}.{COMMANDS[words[0]][0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
