"""Annotations and features: read from official files and from a folder of Parquet, and made from videos."""
