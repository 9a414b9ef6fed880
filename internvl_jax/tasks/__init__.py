"""Ways to learn: one folder each."""
