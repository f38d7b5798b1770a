"""Saves the mapping's gradient of the first global batch for several ways of cutting it.

    gradients.py CUTS.json OUT_FOLDER -- flags of run_training.py

CUTS.json: {name: [extra flags]}. Each gradient is taken where the optimizer would, before clipping.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import save_file

import run_training
from mindmerger.runtime import command, processes


class Taken(Exception):
    """The gradient is saved; the run may end."""


def main():
    """One run for each cut, ended at its first update."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cuts, folder, flags = json.loads(Path(arguments[0]).read_text()), Path(arguments[1]), arguments[3:]
    for name, extra in cuts.items():

        def take(run, step, batch, losses, name=name):
            if processes.is_main():
                mapping = run.engine.module.mapping
                save_file(
                    {key: p.grad.clone() for key, p in mapping.named_parameters()}, folder / f"{name}.safetensors"
                )
            raise Taken

        run_training.apply_gradient = take
        try:
            run_training.main([*flags, "--save_name", name, *extra])
        except Taken:
            continue
        raise AssertionError("the run ended before its first update")
    return 0


if __name__ == "__main__":
    command.run_main(main)
