"""From a meta file to batches of numpy arrays, in four packages, each of which imports only those below it.

    load/      the loader, an iterator over a schedule: decodes ahead, pads batches, counts what is lost, resumes exactly
    schedule/  which samples each step sees, and in which rows: pure functions of seed, settings and sizes
    sample/    a record becomes a sample: tokens, labels and uint8 tiles
    source/    meta files, records and their kinds, files and URLs, the cache of sizes

The order of the samples is decided before anything is decoded, so decoding is the only work that runs in
parallel, and the batches are the same for any number of workers and hosts. The package is numpy only: it imports
neither JAX nor the models.
"""
