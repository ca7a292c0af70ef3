"""From rows and features to a trained, evaluated checkpoint."""
