"""`many_runs.py` where `--liger` takes the loss as Liger does, with torch's operations, on a machine without a GPU."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from many_runs import main
from torch.nn import functional

from mindmerger.runtime import command
from mindmerger.training import speedups


def linear_loss(hidden_MD, weight_VD, labels_M, bias_V):
    """Returns the summed loss, and says that it was asked."""
    print("linear loss of", tuple(weight_VD.shape), file=sys.stderr)
    logits_MV = functional.linear(hidden_MD, weight_VD, bias_V).float()
    return functional.cross_entropy(logits_MV, labels_M, reduction="sum")


speedups.check_speed_options = lambda args, zero_stage: None
speedups.apply_liger = lambda model: setattr(model, "linear_loss", linear_loss)

if __name__ == "__main__":
    command.run_main(main)
