"""Reads a launch script of the reference by running it where nothing can happen, and writes the recipe that it asks for."""
