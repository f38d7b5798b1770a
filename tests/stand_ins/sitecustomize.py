"""Makes `from torch.utils.tensorboard import …` find the stand-in, which Python imports this file for at its start."""

import sys

import tensorboard

sys.modules["torch.utils.tensorboard"] = tensorboard
