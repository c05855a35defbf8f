"""What the search chooses from, and the stages after it."""
