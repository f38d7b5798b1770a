"""The small world of the quickstart: `python -m scripts.tiny_world`."""
