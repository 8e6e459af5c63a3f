"""Adapter for EVA-CLIP: CLIP models of open_clip whose image tower is a timm EVA trunk."""
