"""Vision towers, one file each: sizes, module, and how checkpoints hold it. `hf.towers` has a line for each."""
