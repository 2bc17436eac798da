"""A page to live with an edited model: ask it, edit it, look at its gates, take edits back."""
