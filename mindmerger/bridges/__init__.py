"""What is trained between the two frozen towers: one connector, one file."""
