"""What MindMerger is compared with: one command for each method, run as `python -m baselines.<name>`."""
