"""One inner loop, computed without derivatives, forwards with tangents, or backwards with cotangents."""
