"""What a density costs and buys: loss, needles, speed, and where it breaks."""
