"""InternVL's multimodal training framework, on JAX."""

import os

# transformers advises on every import to install PyTorch, which is not needed for its tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
