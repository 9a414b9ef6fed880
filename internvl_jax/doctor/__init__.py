"""A look at the data before a run: `python -m internvl_jax.doctor` is the command."""
