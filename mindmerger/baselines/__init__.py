"""What MindMerger is compared with: one command for each method, `python -m mindmerger.baselines.<name>`."""
