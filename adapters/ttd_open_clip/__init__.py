"""Adapter for open_clip's native vision transformers (OpenCLIP and OpenAI weights)."""
