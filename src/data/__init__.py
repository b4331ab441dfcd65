"""Image sets: what they are (catalogue), whether they are there (files), how they come (fetch), what a run sees (load)."""
