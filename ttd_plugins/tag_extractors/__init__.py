"""Tag extractors of this package, each a plugin."""
