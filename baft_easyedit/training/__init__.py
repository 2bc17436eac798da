"""Train an edit on requests, and preserve earlier edits meanwhile."""
