"""The page of ``ttd app``: what it computes (:mod:`.studio`), how a result looks (:mod:`.page`), and its layout."""
