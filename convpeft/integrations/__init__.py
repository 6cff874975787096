"""One file per framework, each imported by the user who needs it; nothing in the core imports them."""
