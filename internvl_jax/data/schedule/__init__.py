"""Which samples are in which row of which batch: pure functions of their sizes."""
