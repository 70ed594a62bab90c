"""One inner loop, run plainly, forwards with tangents, or backwards with cotangents."""
