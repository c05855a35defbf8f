"""Studies of calibration data: supervision, tasks, domains."""
