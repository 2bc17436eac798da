"""Read and write files that users name, check their content, and put values into messages."""
