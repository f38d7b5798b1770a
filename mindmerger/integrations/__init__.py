"""Adapters to other programs: each file is one, and needs an extra of its own."""
