"""``open_clip:photo``, the embedded model for photographs. Its folder has the files of ``tiny``, weights in shards."""

from __future__ import annotations

from functools import partial

from ttd_open_clip.tiny import load_tiny
from ttd_plugins.embedded import model_folder

EMBEDDED_FOLDER = model_folder("open_clip_photo")

load_photo = partial(load_tiny, name="open_clip:photo")
