"""A run's folder: its record, what a record may hold, and who may write there."""
