"""Data made by the library itself: rendered videos with known moments, and features simulated from annotations."""
