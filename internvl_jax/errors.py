"""What the user got wrong, apart from what we did."""


class UserError(ValueError):
  """A mistake in a recipe, an argument, a data file or a checkpoint.

  Its message is all that the user sees, without a traceback: one line for each problem, saying what is wrong,
  with which values, and what to do about it. A bug of ours is any other exception and keeps its traceback.
  """
