"""An edit in a Hugging Face model: attached, looked at, taken off. No learning."""
