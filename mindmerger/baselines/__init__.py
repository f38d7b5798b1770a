"""Methods that MindMerger is compared with, one command each: `python -m mindmerger.baselines.<name>`."""
