"""The two frozen towers, the bridge between them, and what the whole computes."""
