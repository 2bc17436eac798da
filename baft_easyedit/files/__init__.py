"""Files that users name, what they hold, and messages about them."""
