"""Where records come from: annotation files, their index, and local or remote files."""
