"""Pictures, and later image-text pairs, from whatever users have."""
