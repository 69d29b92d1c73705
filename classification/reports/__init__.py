"""Pages about finished runs, made of what their folders hold."""
