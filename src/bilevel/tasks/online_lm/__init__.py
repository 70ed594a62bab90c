"""Meta-learned online adaptation of language models (CaMeLS)."""
