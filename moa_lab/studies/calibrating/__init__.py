"""What a plan is calibrated on: whose words, which tasks, which domain."""
