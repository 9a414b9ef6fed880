"""From the schedule to padded batches: the loader, its workers and its counters."""
