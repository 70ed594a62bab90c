"""`bilevel.check`: the full report on a problem, beside the loop that the user would have written."""
