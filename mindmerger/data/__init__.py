"""From examples to tensors: tokenising, the training set on disk, batch order."""
