"""What says beforehand how much a plan will lose."""
