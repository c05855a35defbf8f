"""Studies of density: loss, retrieval, speed, and where retrieval fails."""
