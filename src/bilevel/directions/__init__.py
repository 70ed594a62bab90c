"""Random directions and the statistics of estimates that are made from them."""
