"""Puts a run's pieces together from the configuration: what the commands that compute share."""
