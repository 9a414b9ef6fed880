"""Conversations as batches: pure numpy."""

from internvl_jax.data.load.task import Conversations
from internvl_jax.data.sample.conversations import ConversationLines
from internvl_jax.tasks.preference.lines import PAIRS

DATA = Conversations(lines=ConversationLines(others=(PAIRS,)))
"""Lines of conversations, which knows pairs when it meets them; see `load.task.DataTask`."""
