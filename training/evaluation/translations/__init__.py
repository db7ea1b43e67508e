"""Translators: their translations, scores and report."""
