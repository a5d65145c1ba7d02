"""Row top-K selection by magnitude: the kept values, and where asked the mask."""
