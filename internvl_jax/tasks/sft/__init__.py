"""Supervised fine-tuning: next-token prediction on the answers of conversations."""
