"""The edit of a Hugging Face model: its tensors, hooks, positions and locks. No training."""
