"""What `baft-easyedit demo` shows."""
