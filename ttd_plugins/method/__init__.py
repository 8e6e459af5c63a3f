"""The method itself: similarity maps, tag selection, losses and text embeddings, as tensor functions."""
