"""Everything of a training run but the order in which it happens (run_training.py)."""
