"""Preference optimization of pairs of a chosen and a rejected answer."""
