"""From a meta file to batches of numpy arrays.

    meta.py      the mixture: which annotation files, with which root and how often
    jsonl.py     one annotation file: any line by its number, without keeping parsed lines in memory
    plan.py      order: which sample stands at which place of the stream, a pure function of the seed
    grouping.py  the samples of a step dealt evenly to its devices, for `training.group_by_length`
    sample.py    one line -> tokens (tokenize.py, templates.py) and uint8 tiles (images.py, tiling.py)
    batching.py  samples -> micro-batches -> the padded `SFTBatch` of an optimizer step
    pipeline.py  the stages put together with Grain: workers, prefetch, counters, exact resume

Every place of the stream is decided before anything is decoded, so decoding is the only work that runs in
parallel, and the batches are the same for any number of workers. The room is numpy only: it imports neither
JAX nor the models.
"""
