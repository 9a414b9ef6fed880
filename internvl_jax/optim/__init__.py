"""What an optimizer step does with gradients, and how fast.

labels.py          which parameters train, and which of them decay
learning_rate.py   schedules
optimizer.py       the optimizer: one optax transformation
"""
