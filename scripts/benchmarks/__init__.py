"""Speed and memory, measured: `python -m scripts.benchmarks.<name>`."""
