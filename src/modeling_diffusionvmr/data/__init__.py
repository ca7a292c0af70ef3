"""Annotations and features: official files, converted folders, and extraction from videos."""
