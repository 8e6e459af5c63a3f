"""Adapter for OpenAI's CLIP: transformers' CLIPModel and the models of the original clip package."""
