"""Where files lie: folders of this machine, and buckets of an object store."""
