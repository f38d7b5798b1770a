"""Processes, signals, files, messages and errors; knows no model and no data."""
