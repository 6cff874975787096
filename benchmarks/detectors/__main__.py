"""Take convpeft, peft and LyCORIS through the same steps on every family of the zoo, and write docs/detectors.md.

``python -m benchmarks.detectors`` runs everything; ``--families timm-resnet smp-unet`` prints the table of those alone.
"""

from __future__ import annotations

import argparse

import torch

from .judging import LIBRARIES, run
from .page import PAGE, failures, page, table
from .zoo import FAMILIES


def main() -> None:
    """Run the families asked for; write the page when that is all of them."""
    parser = argparse.ArgumentParser("python -m benchmarks.detectors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="print the tables of these alone")
    chosen = parser.parse_args().families
    torch.set_num_threads(1)
    names = chosen or list(FAMILIES)
    missing = {package for name in names for package in FAMILIES[name].missing}
    if missing:
        parser.error(f"not installed: {', '.join(sorted(missing))}; pip install 'convpeft[detectors]'")
    results = run(names)
    if chosen:
        print(table(results))
        for library in LIBRARIES:
            print(f"\n{library}\n\n{failures(results, library)}")
        return
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
