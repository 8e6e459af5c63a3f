"""Helpers that do not depend on the method, for example files, random state, progress and distributed training."""
