"""Helpers that know nothing of the method: files, random state, settings, progress and distributed training."""
