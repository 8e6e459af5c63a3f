"""Tag extractors that come with the package as plugins."""
