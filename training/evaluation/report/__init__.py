"""Pages: their parts and their look."""
