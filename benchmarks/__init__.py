"""What needs a checkout: kernels compiled ahead of time, tuning, targets, and results kept."""
