"""Pages: their templates, their figures and their look."""
