"""Asking a checkpoint: questions with images and videos, conversations, files of questions, a terminal."""
