"""Grouped matmul: products of rows sorted by group with a matrix for each group, which is what experts compute.

Letters: M rows, K width in, N width out, G groups.
"""

from jaxtyping import Array, Float, Int

from internvl_jax.models.kernels import Backend, find

__all__ = ["BACKENDS", "grouped_matmul"]

BACKENDS: tuple[Backend, ...] = (
  Backend(
    name="megablox",
    function=f"{__name__}.megablox:product",
    platforms=("tpu",),
    reason="JAX's kernels for TPUs; for some widths XLA's compiler for TPUs ends the process in a failed check",
  ),
  Backend(
    name="triton",
    function=f"{__name__}.triton:product",
    platforms=("gpu",),
    # The first with asynchronous copies and products of bfloat16.
    capability=(8, 0),
    oldest_jax=(0, 10),
    module="jax.experimental.pallas.triton",
    reason="without it every row is multiplied by the matrices of all groups, with temporaries of as many times the rows",
  ),
  Backend(
    name="xla",
    function="jax.lax:ragged_dot",
    platforms=("tpu", "gpu", "cpu"),
    reason="runs everywhere; on CPUs and GPUs every row meets every group's matrix",
  ),
  Backend(
    name="megablox_interpret",
    function=f"{__name__}.megablox:interpreted",
    platforms=(),
    interpret=True,
    reason="what 'megablox' computes, where there is no TPU",
  ),
  Backend(
    name="triton_interpret",
    function=f"{__name__}.triton:interpreted",
    platforms=(),
    interpret=True,
    reason="what 'triton' computes, where there is no GPU",
  ),
)
"""Ways to compute grouped matmuls, the preferred first."""


def grouped_matmul(
  rows: Float[Array, "M K"], matrices: Float[Array, "G K N"], sizes: Int[Array, " G"], *, backend: str = "xla"
) -> Float[Array, "M N"]:
  """Grouped matmul: multiplies each group's rows with its matrix, and can be differentiated by both.

  Args:
    rows: [M, K], those of the first group first.
    matrices: [G, K, N], in the dtype of rows.
    sizes: int [G], rows of each group; together at most M.
    backend: the name of a row of `BACKENDS`.

  Returns:
    [M, N] in the dtype of rows. What rows after the last group hold is left open.

  Raises:
    ValueError: an unknown backend.
  """
  return find(BACKENDS, backend).load()(rows, matrices, sizes)
