"""``ttd app``: what it computes (:mod:`.studio`), its HTML (:mod:`.rendering`), and its page (:mod:`.gradio_page`)."""
