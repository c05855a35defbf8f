"""Studies of the search space, and of the stages after the search."""
