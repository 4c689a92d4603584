"""Models as transformers loads them, with our caches under their attention."""
