"""From gradients to updates.

labels.py            which parameters train, and which of them decay
learning_rate.py     schedules
rates.py             which parameters have another rate
optimizer.py         the optimizer: one optax transformation; the tables of optimizers and of what is added to them
eight_bit.py         Adam with moments of eight bits
transformations.py   clipping and scaling, by what the step and the host know
average.py           averages of the weights
"""
