"""Ahead of time: the whole training step compiled for devices that need not be there, and what it would take."""
