"""From a meta file to batches of numpy arrays.

    meta.py      the mixture: which annotation files, with which root and how often
    jsonl.py     one annotation file: any line by its number, without keeping parsed lines in memory; formats.py: what
                 a file is that is no jsonl
    records.py   which keys of lines and turns are read, honored, refused or passed over
    sample.py    one line -> tokens (tokenize.py, templates.py) and uint8 tiles (images.py, tiling.py, video.py)
    fitting.py   what becomes of a sample that is longer than it may be
    sizes.py     how long every line is, kept on disk; pieces.py: what is left of those that are too long
    mixture.py   all samples by number: their sizes, and decoded
    plan.py      order: which sample stands at which place of the stream, a pure function of the seed
    grouping.py  the samples of a step dealt evenly to its devices, for `training.group_by_length`
    packing.py   which samples share a row, from their sizes; rows.py: the stream of those rows
    batching.py  samples -> micro-batches -> the padded `SFTBatch` of an optimizer step
    decoding.py  micro-batches decoded ahead, by worker processes or threads
    tally.py     what became of the samples, and which losses end a run
    pipeline.py  the stages put together: the loader, with exact resume
    examine.py   what a run would make of the data; show.py: samples and batches as text

Every place of the stream is decided before anything is decoded, so decoding is the only work that runs in
parallel, and the batches are the same for any number of workers and hosts. The room is numpy only: it imports
neither JAX nor the models.
"""
