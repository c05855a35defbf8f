"""Studies of how well a plan's loss can be predicted."""
