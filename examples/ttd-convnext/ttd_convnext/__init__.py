"""Adapter of ttd-plugins for open_clip's ConvNeXt CLIP models."""
