"""Options and recipes: what a user types, checked before any work is done."""
