"""Draw guidance.png of studies.md, the scales the table `sampler` learned: python docs/make_guidance.py --root EXPERIMENTS"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chainrule.experiments.table import read
from chainrule.experiments.unit import units
from chainrule.files import write_picture
from chainrule.report.plots import plot


def main() -> None:
    """Draw a curve for each seed that was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="Folder of the results.")
    root = parser.parse_args().root
    curves = {}
    for unit in units(read("sampler")):
        if unit.label == "DRaFT, guidance weights" and unit.done(root):
            told = json.loads((unit.folder(root) / "adapter/learned/guidance/guidance.json").read_text(encoding="utf-8"))
            curves[f"seed {unit.seed}"] = [(i, scale) for i, (_, scale) in enumerate(told["schedule"], 1)]
    picture = plot(curves, "The learned guidance scale", "sampling step, from the noisiest to the last")
    write_picture(Path(__file__).with_name("guidance.png"), picture)


if __name__ == "__main__":
    main()
