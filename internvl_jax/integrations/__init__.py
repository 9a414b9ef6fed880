"""Adapters by which benchmarks of others ask our models; nothing here is imported by the rest of the package."""
