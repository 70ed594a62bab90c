"""How a run is written and shown: files, progress, pictures, and the page."""
