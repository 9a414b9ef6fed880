"""The model: InternViT, the projector and the language model, as NNX modules.

Modules hold no config object and no mesh: they copy the numbers they need, and name their parameters' axes
logically (`internvl_jax.parallel.rules` maps names to the mesh). Activations carry the compute dtype;
parameters are cast to it where they are used, while norms, softmax and the loss run in float32.
"""
