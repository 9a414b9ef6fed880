"""From a record to a sample: tokens, labels and tiles."""
