"""Studies of bit widths for weights and KV values: predicted losses, and widths under a byte budget."""
