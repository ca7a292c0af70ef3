"""Synthetic data: rendered videos with known moments, and features simulated from annotations."""
