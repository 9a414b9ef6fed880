"""Conversations as batches: pure numpy."""

from internvl_jax.data.load.task import Conversations
from internvl_jax.data.sample.conversations import ConversationLines
from internvl_jax.tasks import other_kinds

DATA = Conversations(lines=ConversationLines(others=other_kinds()))
"""Lines of conversations, which explains other tasks' lines where it meets them; see `load.task.DataTask`."""
