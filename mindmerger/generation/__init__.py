"""Texts in, texts out; one engine, one file."""
