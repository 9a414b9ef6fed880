"""A comparison with PyTorch on a user's own data and checkpoint: `python -m internvl_jax.certify` is the command."""
