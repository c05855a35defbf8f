"""Bit widths for weights and KV values: what a width would lose, and how bytes are shared."""
