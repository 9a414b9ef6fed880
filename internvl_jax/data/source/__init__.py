"""Where records come from: annotation files, their index, and files that may lie elsewhere."""
