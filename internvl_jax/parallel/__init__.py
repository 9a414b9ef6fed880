"""Devices: the mesh, and the one table from logical axis names to its axes."""
