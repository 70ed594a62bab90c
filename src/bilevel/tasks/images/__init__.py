"""Readers of labelled images in the formats in which people have them."""
