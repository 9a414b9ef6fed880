"""Training: `python -m internvl_jax.train` is the command, `run.train` what it calls."""
