"""Answering questions about images, and scoring the answers."""
