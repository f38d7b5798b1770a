"""What one can look at: `python -m mindmerger.analysis.<name>`."""
