"""Raw text to prepared data sets on disk."""
