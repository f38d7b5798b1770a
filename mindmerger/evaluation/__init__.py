"""Everything of an evaluation but the order in which it happens (run_evaluation.py)."""
