"""The table of attention's backends."""

from internvl_jax.models.attention.mask import CACHED_PROMPTS
from internvl_jax.models.kernels import Backend

_ROOM = "internvl_jax.models.attention"
_ALL = frozenset({"windows", "sinks"})

BACKENDS: tuple[Backend, ...] = (
  Backend(
    name="splash",
    function=f"{_ROOM}.splash:attention",
    platforms=("tpu",),
    takes=_ALL,
    reason="JAX's own kernels for TPUs: no score leaves the chip, blocks that the mask hides whole are skipped",
  ),
  Backend(
    name="triton",
    function=f"{_ROOM}.triton:attention",
    platforms=("gpu",),
    takes=_ALL | {"index of queries", "shared prompts"},
    widest_head=128,
    capability=(8, 0),
    oldest_jax=(0, 10),
    module="jax.experimental.pallas.triton",
    reason="without it, attention reads and writes scores in memory and takes a multiple of the time",
  ),
  Backend(
    name="cpu",
    function=f"{_ROOM}.cpu:attention",
    platforms=("cpu",),
    takes=_ALL | {"index of queries", "shared prompts"},
    reason="by blocks that stay in a core's cache, without the hidden ones: 2 to 3 times as fast as 'xla'",
  ),
  Backend(
    name="xla",
    function=f"{_ROOM}.xla:attention",
    platforms=("tpu", "gpu", "cpu"),
    takes=_ALL | {"index of queries", CACHED_PROMPTS},
    reason="runs everywhere; memory is linear in the length, and blocks that the mask hides whole are skipped",
  ),
  Backend(
    name="plain",
    function=f"{_ROOM}.xla:plain",
    platforms=(),
    takes=_ALL | {"index of queries", CACHED_PROMPTS},
    reason="all scores in memory: what the others are compared with, and what operations are counted by",
  ),
  Backend(
    name="splash_interpret",
    function=f"{_ROOM}.splash:interpreted",
    platforms=(),
    takes=_ALL,
    interpret=True,
    reason="what 'splash' computes, where there is no TPU",
  ),
  Backend(
    name="triton_interpret",
    function=f"{_ROOM}.triton:interpreted",
    platforms=(),
    takes=_ALL | {"index of queries", "shared prompts"},
    interpret=True,
    reason="what 'triton' computes, where there is no GPU",
  ),
)
"""Ways to compute attention, the preferred first.

Why "triton" is a kernel of ours: cuDNN's attention (by `jax.nn.dot_product_attention`) takes packed segments only as a
dense mask [T, S]; JAX's Pallas `mha` wants keys and values repeated for grouped heads and skips no block of another
segment; tokamax 0.0.17 has segments in its private modules alone, and needs Python 3.12. Ours runs on Python 3.11 and
JAX 0.10, skips what segments hide, and knows windows, sinks and shared prompts.
"""
