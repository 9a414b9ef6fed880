"""Storage: folders of this machine, and buckets of an object store, under one kind of path."""
