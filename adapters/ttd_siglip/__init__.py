"""Adapter for SigLIP and SigLIP 2, from transformers and from open_clip with timm."""
