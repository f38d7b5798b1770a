"""Folders and hub names of models, looked at before a weight is read."""
