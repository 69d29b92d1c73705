"""Pages about finished runs, made from their run folders, and comparisons of recipes."""
