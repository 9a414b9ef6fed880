"""Resumable checkpoints, by Orbax.

checkpointer.py  saves and restores a run, and chooses the checkpoint to resume from
manager.py       Orbax's classes as far as they do not do what is needed here
folders.py       folders under way: how a checkpoint becomes complete, on a disk and in a bucket
"""
