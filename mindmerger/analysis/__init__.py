"""Analyses of data and models, one command each: `python -m mindmerger.analysis.<name>`."""
